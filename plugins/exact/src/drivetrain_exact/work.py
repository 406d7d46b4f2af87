"""What the plugin keeps of one job: unit, streams, and the checks before the first step."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from drivetrain.contracts import Op, Purpose, Tag
from drivetrain.errors import ConfigError
from drivetrain_exact.dropout import DropoutStreams
from drivetrain_exact.fingerprint import fingerprint, refuse_unlike_ranks
from drivetrain_exact.norm import ExactNorm
from drivetrain_exact.quantum import Quantum
from drivetrain_exact.rule import exact_rule

if TYPE_CHECKING:
    from drivetrain.contracts import UpdateRule
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job
    from drivetrain_exact.section import ExactSection

logger = logging.getLogger("drivetrain.exact")


class Work:
    """One job that computes exactly.

    Args:
        job: whose gradients are summed.
        section: headroom and threads.

    Attributes:
        quantum: the unit of its gradients.
    """

    def __init__(self, job: Job, section: ExactSection) -> None:
        self.quantum = Quantum(section.headroom, job.device)
        self._job = job
        self._described: nn.Module | None = None
        self._module: nn.Module | None = None
        self._streams = DropoutStreams()
        self._wants_norms = False
        self._fix_kernels(section.threads)

    @classmethod
    def begin(cls, job: Job, section: ExactSection) -> None:
        """The work of a job that opens."""
        _works[job] = cls(job, section)

    @classmethod
    def of(cls, job: Job) -> Work:
        """The work of a job."""
        return _works[job]

    def _fix_kernels(self, threads: int) -> None:
        """Have torch choose kernels that do not depend on chance, until the job is closed."""
        before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
        warned = torch.is_deterministic_algorithms_warn_only_enabled()

        def restore() -> None:
            torch.set_num_threads(before[0])
            torch.use_deterministic_algorithms(before[1], warn_only=warned)

        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(True)
        self._job.on_close(restore)

    # -- set-up -------------------------------------------------------------------------------

    def describe(self, module: nn.Module) -> None:
        """Have gradients added up and sent in float64.

        Raises:
            ConfigError: the module keeps running statistics, is tied over stages of a pipeline, or
                is in float64.
        """
        self._described = module
        for name, part in module.named_modules():
            if isinstance(part, _NormBase) and part.running_mean is not None:
                raise ConfigError(
                    f"exact: {name or 'the module'} ({type(part).__name__}) keeps running "
                    "statistics, to which each rank adds its own micro-batches: use a norm "
                    "without them (LayerNorm, RMSNorm, GroupNorm)"
                )
        for parameter in module.parameters():
            if not parameter.requires_grad:
                continue
            info = self._job.parameters.info(parameter)
            if info.compute_dtype.itemsize > 4 or info.compute_dtype.is_complex:
                raise ConfigError(
                    f"exact: parameter {info.name} is in {info.compute_dtype}; sums in float64 are "
                    "exact for gradients in float32 and less"
                )
            if isinstance(info.reduction, tuple) and "pp" in info.reduction:
                raise ConfigError(
                    f"exact: parameter {info.name} is shared by stages of a pipeline, each of "
                    "which rounds its own part of the gradient: untie it, or leave out the "
                    "pipeline"
                )
            info.gradient_dtype = info.reduce_dtype = torch.float64

    def wrap(self, rule: UpdateRule) -> UpdateRule:
        """The rule of the one engine that trains.

        Raises:
            ConfigError: there is one already, or the rule's results depend on the layout.
        """
        if self._module is not None:
            raise ConfigError("exact: a job has one engine that trains; open another job")
        exact = exact_rule(rule, self._job.device)
        self._module = self._described
        return exact

    def norm(self) -> ExactNorm:
        """The norm of gradients in this job."""
        refuse_unlike_ranks(self._job)
        module = self._module or self._described
        assert module is not None, "described before states are built"
        elements = sum(math.prod(self._job.parameters.info(p).shape) for p in module.parameters())
        return ExactNorm(self._job, self.quantum, elements)

    # -- the loop -----------------------------------------------------------------------------

    def begin_forward(self, engine: Engine) -> None:
        """Before each forward of the engine that trains."""
        if not self._wants_norms:
            self._wants_norms = True
            engine.get_global_grad_norm()  # from now on every step computes it
        micro_batches = engine.gradient_accumulation_steps() * self._job.mesh.size("dp")
        self.quantum.begin(engine.loss_scaler.scale_value * micro_batches)
        self._streams.begin(engine)

    def fits(self, engine: Engine) -> bool:
        """Whether this window's sums are exact; else it is dropped. Collective."""
        self._streams.refuse_drawn(engine)
        told = self.quantum.seen()
        tag = Tag(Purpose.CONTROL, site="largest gradient")
        self._job.communicator.all_reduce(told, "world", tag, op=Op.MAX)
        largest, times = float(told[0]), float(told[1]) * self._job.mesh.size("dp")
        if self.quantum.fits(largest, times):
            return True
        engine.states.finish_reduction()
        engine.states.discard_gradients()
        engine.record_gradient_norm(None)
        self.quantum.learn(largest * times)
        if self._job.rank == 0:
            logger.warning(
                "step %d is skipped: an element of a gradient is %.3g, more than sums can be exact "
                "with that were expected to stay below 2**%s; the next step is ready for it",
                engine.global_steps + 1,
                largest,
                self.quantum.exponent,
            )
        return False

    # -- checkpoints --------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same bits."""
        return {"exponent": self.quantum.exponent, "kernels": fingerprint(self._job.device)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`; a checkpoint of a run without this package has none."""
        self.quantum.resume(state["exponent"])
        own = fingerprint(self._job.device)
        if state["kernels"] not in (None, own) and self._job.rank == 0:
            logger.warning(
                "exact: the checkpoint was made with %s, and this is %s: from here on bits may "
                "differ from those of a run that goes on there",
                state["kernels"],
                own,
            )


_works: WeakKeyDictionary[Job, Work] = WeakKeyDictionary()
