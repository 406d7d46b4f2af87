"""The plugin: a layer below the byte log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar
from weakref import WeakKeyDictionary

from drivetrain.contracts import (
    Communicator,
    CommunicatorLayer,
    CommunicatorPhase,
    Plugin,
    Problem,
    Sections,
    hookimpl,
)
from drivetrain.errors import ConfigError
from drivetrain_communication.routes.section import ANY, PATH, RoutesSection

if TYPE_CHECKING:
    from drivetrain.job.job import Job
    from drivetrain.plan.plan import Plan
    from drivetrain_communication.routes.router import Router


class Routes(Plugin):
    """Owns ``communication.routes``."""

    name = PATH
    sections: ClassVar[Sections] = {PATH: RoutesSection}

    @property
    def config(self) -> RoutesSection:
        """The section."""
        return self.section(RoutesSection)

    def enabled(self) -> bool:
        return self.config.hierarchical or bool(self.config.rules) or self.config.table is not None

    def features(self) -> Mapping[str, object]:
        return {f"{PATH}.hierarchical": self.config.hierarchical}

    @hookimpl
    def configure(self, plan: Plan) -> Sequence[Problem]:
        found = []
        size, ranks = self.config.ranks_per_host or 1, plan.world_size
        if ranks % size:
            flaw = f"is {size}, which does not divide the {ranks} ranks"
            found.append(Problem(f"{PATH}.ranks_per_host", flaw))
        for number, rule in enumerate(self.config.rules):
            try:
                plan.layout.size("world" if rule.axis == ANY else rule.axis)
            except ConfigError as error:
                found.append(Problem(f"{PATH}.rules[{number}].axis", str(error)))
        return found

    @hookimpl(trylast=True)  # around what accelerators bring, which is one of the ways
    def wrap_communicator(self, job: Job) -> Sequence[CommunicatorLayer]:
        from drivetrain_communication.routes.hierarchy import hosts_of
        from drivetrain_communication.routes.presence import require
        from drivetrain_communication.routes.router import Router
        from drivetrain_communication.routes.table import read_table

        if job.world_size == 1:
            return ()
        hosts = hosts_of(job, self.config.ranks_per_host)

        def wrap(inner: Communicator) -> Communicator:
            router = routers[job] = Router(inner, job, self.config, hosts)
            wanted: list[str] = [rule.route for rule in self.config.rules]
            if self.config.table is not None:
                router.table = read_table(job, self.config.table, inner, hosts)
                wanted += router.table.routes()
            require(job, inner, wanted)  # on all ranks, before any of them opens one
            for route in wanted:
                router.way(route)
            return router

        return (CommunicatorLayer(CommunicatorPhase.ROUTE, wrap),)


routers: WeakKeyDictionary[Job, Router] = WeakKeyDictionary()
"""The router of each open job."""
