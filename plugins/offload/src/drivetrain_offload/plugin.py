"""The plugin: gives states homes in host memory and in files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from drivetrain.contracts import Problem, Sections, hookimpl
from drivetrain_offload.memory import LogsMemory, noted_memory
from drivetrain_offload.section import Aio, OffloadOptimizer, OffloadParam
from drivetrain_offload.zenflow_section import ZenFlow

if TYPE_CHECKING:
    from drivetrain.contracts import BucketSpec, StateHome
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job
    from drivetrain.plan.plan import Plan

OPTIMIZER = "zero_optimization.offload_optimizer"
PARAM = "zero_optimization.offload_param"
ZENFLOW = "zero_optimization.zenflow"
STAGE = "zero_optimization.stage"


class Offload(LogsMemory):
    """Owns both offload sections of ``zero_optimization``, and ``aio``."""

    name = "offload"
    sections: ClassVar[Sections] = {
        OPTIMIZER: OffloadOptimizer,
        PARAM: OffloadParam,
        ZENFLOW: ZenFlow,
        "aio": Aio,
    }

    @property
    def _zenflow(self) -> ZenFlow | None:
        """The section, if the config contains it."""
        return self.section(ZenFlow) if ZENFLOW in self._sections else None

    def enabled(self) -> bool:
        devices = (self.section(OffloadOptimizer).device, self.section(OffloadParam).device)
        return any(device != "none" for device in devices) or self._zenflow is not None

    def features(self) -> Mapping[str, object]:
        optimizer = self.section(OffloadOptimizer)
        return {
            f"{OPTIMIZER}.device": optimizer.device,
            f"{PARAM}.device": self.section(OffloadParam).device,
            f"{OPTIMIZER}.ratio": optimizer.ratio,
            f"{OPTIMIZER}.delayed_update": optimizer.delayed_update,
            f"{OPTIMIZER}.super_offload": optimizer.super_offload,
            ZENFLOW: self._zenflow is not None,
        }

    def feature_values(self) -> Mapping[str, Sequence[object]]:
        return {f"{OPTIMIZER}.device": ("none", "cpu"), f"{OPTIMIZER}.ratio": (1.0, 0.4)}

    @hookimpl
    def configure(self, plan: Plan) -> Sequence[Problem]:
        optimizer, stage = self.section(OffloadOptimizer), plan.features().get(STAGE, 0)
        found = []
        if optimizer.ratio < 1 and optimizer.device == "none":
            found.append(Problem(f"{OPTIMIZER}.ratio", "is given, but device is none"))
        kinds = [
            f"{OPTIMIZER}.{key}"
            for key in ("delayed_update", "super_offload")
            if getattr(optimizer, key)
        ]
        kinds += [ZENFLOW] if self._zenflow is not None else []
        if kinds[1:]:
            flaw = f"cannot be combined with {kinds[1]}: each says when an update is computed"
            found.append(Problem(kinds[0], flaw))
        if optimizer.device != "cpu":
            flaw = f"needs offload_optimizer.device cpu, got {optimizer.device}"
            found += [Problem(path, flaw) for path in kinds]
        if self._zenflow is not None and self.section(OffloadParam).device != "none":
            flaw = "updates columns on the device, where the parameters have to stay for that"
            found.append(Problem(f"{PARAM}.device", f"zenflow {flaw}"))
        if optimizer.super_offload and self.section(OffloadParam).device == "nvme":
            flaw = "updates parameters while backward goes on, when they may be in their files only"
            found.append(Problem(f"{OPTIMIZER}.super_offload", flaw))
        if self.section(Aio).use_gds:
            flaw = "no accelerator moves data between files and its memory directly yet; use false"
            found.append(Problem("aio.use_gds", flaw))
        if self.section(OffloadParam).device != "none" and stage != 3:
            flaw = f"parameters stay away from the device at stage 3 only, got stage {stage}"
            found.append(Problem(f"{PARAM}.device", flaw))
        return found

    @hookimpl
    def place_state(self, job: Job, specs: Sequence[BucketSpec]) -> Sequence[StateHome]:
        from drivetrain_offload.placement import homes_of

        return homes_of(
            job,
            specs,
            self.section(OffloadOptimizer),
            self.section(OffloadParam),
            self.section(Aio),
            self._zenflow,
        )

    @hookimpl
    def memory_rows(self, engine: Engine) -> Sequence[tuple[str, str, int, int]]:
        return [(r.kind, r.place, r.nbytes, r.locked) for r in noted_memory(engine.job)]
