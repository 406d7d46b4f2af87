"""The plugin: a layer below the byte log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from drivetrain.contracts import (
    Communicator,
    CommunicatorLayer,
    CommunicatorPhase,
    Plugin,
    Problem,
    Sections,
    hookimpl,
)
from drivetrain_communication.routes.section import PATH, RoutesSection

if TYPE_CHECKING:
    from drivetrain.job.job import Job
    from drivetrain.plan.plan import Plan


class Routes(Plugin):
    """Owns ``communication.routes``."""

    name = PATH
    sections: ClassVar[Sections] = {PATH: RoutesSection}

    @property
    def config(self) -> RoutesSection:
        """The section."""
        return self.section(RoutesSection)

    def enabled(self) -> bool:
        return self.config.hierarchical

    def features(self) -> Mapping[str, object]:
        return {f"{PATH}.hierarchical": self.config.hierarchical}

    @hookimpl
    def configure(self, plan: Plan) -> Sequence[Problem]:
        size, ranks = self.config.ranks_per_host or 1, plan.world_size
        if ranks % size:
            flaw = f"is {size}, which does not divide the {ranks} ranks"
            return [Problem(f"{PATH}.ranks_per_host", flaw)]
        return []

    @hookimpl
    def wrap_communicator(self, job: Job) -> Sequence[CommunicatorLayer]:
        from drivetrain_communication.routes.hierarchy import Hierarchical, hosts_of

        if job.world_size == 1:
            return ()
        hosts = hosts_of(job, self.config.ranks_per_host)

        def wrap(inner: Communicator) -> Communicator:
            return Hierarchical(inner, job.mesh.ranks, hosts, self.config.minimum_bytes)

        return (CommunicatorLayer(CommunicatorPhase.ROUTE, wrap),)
