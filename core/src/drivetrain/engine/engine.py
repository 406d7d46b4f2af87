"""The training object that users hold: forward, backward, step, and what loops ask of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from torch import nn

from drivetrain import checkpoint
from drivetrain.engine.accumulation import Accumulation, EngineSettings
from drivetrain.engine.backward_window import (
    BackwardWindow,
    ScaledLosses,
    check_loss,
    starting_points,
)
from drivetrain.engine.loader import build_loader, endless_batches
from drivetrain.engine.micro_batches import mean_over_ranks
from drivetrain.engine.step_reporter import StepReporter
from drivetrain.engine.stepping import checked_weight, total_weight
from drivetrain.errors import TrainingError
from drivetrain.job.ownership import refuse_kept_elsewhere
from drivetrain.job.spmd_guard import check_same_model
from drivetrain.optimization.facade import EngineOptimizer
from drivetrain.plan.known import ENGINE
from drivetrain.precision.loss_watch import LossWatch
from drivetrain.sections.optimization import GradientAllreduceOp, GradientClipping
from drivetrain.states.whole import load_own, of_all_ranks, whole, whole_state_dict

if TYPE_CHECKING:
    from drivetrain.contracts.loop.runner import Runner
    from drivetrain.contracts.loop.step_report import StepReport
    from drivetrain.contracts.state.model_states import ModelStates
    from drivetrain.engine.loader import DataLoader
    from drivetrain.job.job import Job
    from drivetrain.job.progress import Progress
    from drivetrain.precision.loss_scale import LossScaler
    from drivetrain.precision.precision import Precision


class Engine(EngineSettings, nn.Module):
    """A module together with its states, optimizer and schedule; built by ``job.engine``.

    Attributes that an engine does not have are looked up in :attr:`module`, and then among the
    methods that installed packages offer: functions whose first argument is the engine, named by
    entry points of ``drivetrain.methods``.

    Attributes:
        optimizer_type: class of :attr:`optimizer`.
        module: the client's module, after transforms.
        job: accelerator, mesh, communicator.
        states: who owns parameters, gradients and optimizer states.
        optimizer: a real ``torch.optim.Optimizer`` over the client's parameters, or ``None``.
        lr_scheduler: the schedule, or ``None``.
        training_dataloader: the loader of ``training_data``, or ``None``.
        progress: steps, samples, tokens; saved.
        runner: the micro-batch loop of :meth:`train_batch`.
        last_report: what the latest step did, or ``None``.
    """

    optimizer_type: ClassVar[type[EngineOptimizer]] = EngineOptimizer
    runner: Runner

    def __init__(
        self,
        job: Job,
        module: nn.Module,
        states: ModelStates,
        *,
        precision: Precision,
        loss_scaler: LossScaler,
        progress: Progress,
    ) -> None:
        super().__init__()
        self.module, self.job = module, job
        self.states = states
        self.precision = precision
        self.loss_scaler = loss_scaler
        self.optimizer: EngineOptimizer | None = None
        self.lr_scheduler: Any | None = None
        self.training_dataloader: DataLoader | None = None
        self.progress = progress
        self.last_report: StepReport | None = None
        section = job.plan.section
        self._accumulation = Accumulation(job.plan, progress)
        self._clipping = section(GradientClipping).root
        self._averages = section(GradientAllreduceOp).root == "mean"
        self._losses = LossWatch(job.device)
        self._window = BackwardWindow(self._unannounced_begins, states.end_backward)
        self._reducing = True
        self._scaled = ScaledLosses(job.losses, self._losses.add_term, loss_scaler)
        self._norm: torch.Tensor | None = None
        self._norm_wanted = self._has_scaled = self._applied = False
        self._batches: Iterator[Any] | None = None
        self._on_destroy: list[Callable[[], object]] = []
        self._reporter = StepReporter(job.plan)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("module", "job"):
                raise
            if hasattr(self.module, name):
                return getattr(self.module, name)
            entry = self.job.plan.registry.find("methods", name)
            if entry is None:
                raise AttributeError(self._lacks(name), name=name, obj=self) from None
            return entry.load().__get__(self)

    def __deepcopy__(self, *_: object) -> NoReturn:
        """Refuse: an engine stands for process groups, hooks and shards of this job."""
        raise TrainingError(
            "an engine can be neither copied nor pickled: copy engine.module inside "
            "`with drivetrain.whole(engine.module):`, or use engine.save_checkpoint()"
        )

    __copy__ = __reduce_ex__ = __deepcopy__

    # -- the loop -----------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module on one micro-batch, in the configured precision.

        While it trains, dropout and all else that draws from the device's default generator draws
        from the job's random stream "dropout", which differs between data-parallel ranks.
        """
        with self.job.span("forward"):
            args, kwargs = self.job.hub.prepare_inputs(self, args, kwargs)
            self._window.settle()
            draws = self.job.random.fork("dropout") if self.training else nullcontext()
            with self.precision.autocast(self.job.device), draws:
                outputs = self.module(*args, **kwargs)
        if self.training and torch.is_grad_enabled():
            self._reporter.count_tokens(args, kwargs)
            if self.optimizer is not None:
                self._window.watch(outputs)
        return outputs

    def backward(
        self,
        loss: torch.Tensor,
        retain_graph: bool = False,
        scale_wrt_gas: bool = True,
        *,
        weight: float | torch.Tensor | None = None,
        last: bool | None = None,
    ) -> torch.Tensor:
        """Accumulate the gradients of ``loss``.

        A rank's loss is the mean over what this rank has: the samples of its micro-batch, or the
        tokens of its part of the sequences. The engine takes the mean over the axis ``data``
        (dp x sp) and over the micro-batches of the window. Where these means are over different
        numbers of tokens, their mean is not that over all tokens, unless ``weight`` tells how many
        they are: the update then uses sum(weight * gradient) / sum(weight) over ranks and calls.

        Args:
            loss: 0-d tensor, the mean over what this rank has.
            retain_graph: as for ``torch.Tensor.backward``.
            scale_wrt_gas: the loss is one of ``gradient_accumulation_steps()`` terms of a mean;
                ``False`` when the caller has divided it already.
            weight: number of tokens or samples that the loss is a mean of, at least 0; a number or
                a 0-d tensor. In one window all losses of all ranks have weights, or none has. The
                gradients of a loss of weight 0 must be finite, the loss need not.
            last: whether the window has no backward after this one; by default the engine
                counts steps, so who runs several micro-batches before a step says it.

        Returns:
            The detached loss, divided by the accumulation steps if ``scale_wrt_gas`` and without a
            weight.

        Raises:
            TrainingError: not a scalar loss with a graph, an engine without optimizer, a bad
                weight, or only some losses of the window have weights.
        """
        if weight is not None and not scale_wrt_gas:
            raise TrainingError("a loss that is divided (scale_wrt_gas=False) has no weight")
        scaled = self._begin_loss(loss, weight, divided=not scale_wrt_gas)
        steps = self._accumulation.counted_steps
        self._run_backward([scaled], [None], retain_graph, last)
        return loss.detach() / steps if scale_wrt_gas and weight is None else loss.detach()

    def backward_from(
        self,
        outputs: Any,
        gradients: Any,
        *,
        retain_graph: bool = False,
        weight: float | torch.Tensor | None = None,
        last: bool | None = None,
    ) -> None:
        """Accumulate gradients from outputs whose own gradients are known, without a loss.

        For the stages of a pipeline before the last. The gradients come from a loss that
        :meth:`backward` of another rank has scaled, so nothing is scaled here.

        Args:
            outputs: a tensor or nested tensors, made by this rank's part of the model.
            gradients: nested alike; a tensor of the same shape for every output with a graph,
                ``None`` for everything else.
            retain_graph: as for ``torch.Tensor.backward``.
            weight: that :meth:`backward` had; only extra losses of this rank's layers need it.
            last: see :meth:`backward`.

        Raises:
            TrainingError: outputs and gradients do not fit, or no output has a graph.
        """
        self._require_optimizer("run backward")
        self._scaled.goes_on(self.loss_scaler, checked_weight(weight))
        self._run_backward(*starting_points(outputs, gradients), retain_graph, last)

    def gradients_ready(self, parameters: Iterable[nn.Parameter], last: bool | None = None) -> None:
        """Take the ``.grad`` of parameters, computed apart from a backward, as one micro-batch's.

        For schedules that compute gradients of weights later than those of inputs. Whatever is
        not handed over in one call for each micro-batch has to be deferred before, in
        ``engine.states.defer``, and again as long as more is to come.

        Args:
            parameters: whose gradients are of a loss that was scaled as all others.
            last: see :meth:`backward`.
        """
        self._require_optimizer("take gradients")
        self._begin_backward(last)
        self.states.gradients_ready(parameters)
        self.states.end_backward()

    def scale(self, loss: torch.Tensor, weight: float | torch.Tensor | None = None) -> torch.Tensor:
        """Apply loss scale (needed with fp16) and weight, for a ``backward`` of the caller's."""
        self._has_scaled = True
        return self._begin_loss(loss, weight, divided=False)

    def step(self, lr_kwargs: dict[str, Any] | None = None, *, micro_batches: int = 1) -> None:
        """End a micro-batch; at an accumulation boundary, update the parameters.

        Args:
            lr_kwargs: passed on to the scheduler's ``step``.
            micro_batches: how many have ended since the last step, with their backwards.

        Raises:
            TrainingError: called inside :meth:`no_sync`, a loss was not finite, or fp16 gradients
                overflow at the smallest loss scale.
        """
        optimizer = self._require_optimizer("step")
        if not self._reducing:
            raise TrainingError("step() inside no_sync(): leave the block before stepping")
        if micro_batches < 1:
            raise TrainingError(f"a step ends at least one micro-batch, got {micro_batches}")
        self._window.settle()
        scales = self.loss_scaler.active or bool(self.states.weighted)
        self.states.take_set_gradients(unscaled=scales and not self._has_scaled)
        self.progress.end_micro_batches(micro_batches - 1)
        if self.is_gradient_accumulation_boundary():
            optimizer.refuse_other_groups()
            self._losses.check(self.loss_scaler.dynamic or self.precision.lenient, self.progress)
            rates = tuple(float(group.get("lr", "nan")) for group in optimizer.param_groups)
            with self.job.span("step"):
                self._applied = bool(self.job.hub.optimizer_step(self))
            self._end_window(rates, lr_kwargs)
        else:
            self.progress.end_micro_batches(1)
        self._has_scaled = False

    def skip_step(self) -> None:
        """Instead of :meth:`step` at a boundary: drop the gradients and count a skipped step.

        Every rank must skip together.
        """
        assert self.optimizer is not None
        self._window.settle()
        self.states.finish_reduction()
        self.states.discard_gradients()
        self.record_gradient_norm(None)
        self._applied = self._has_scaled = False
        self._end_window(tuple(float(g["lr"]) for g in self.optimizer.param_groups), None)

    def train_batch(self, data_iter: Iterator[Any] | None = None) -> torch.Tensor:
        """Run one global batch: all its micro-batches and the update.

        Args:
            data_iter: yields micro-batches; by default the engine's training loader, repeated.

        Returns:
            The mean loss, a 0-d tensor, the same on every rank.
        """
        if data_iter is None:
            if self._batches is None:
                self._batches = endless_batches(self.training_dataloader, self)
            data_iter = self._batches
        self.train()
        total = self._losses.with_terms(self.runner.run(data_iter, train=True))
        return mean_over_ranks(self.job, total)

    def eval_batch(self, data_iter: Iterator[Any]) -> torch.Tensor:
        """Mean loss of one micro-batch per data shard, without gradients."""
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                return mean_over_ranks(self.job, self.runner.run(data_iter, train=False))
        finally:
            self.train(was_training)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients accumulated so far, and the losses that they are of."""
        self._window.settle()
        self.states.discard_gradients()
        self._losses.take()

    def drop_window(self) -> None:
        """Begin a window: forget gradients, losses and tokens since the last boundary."""
        if self.optimizer is not None:
            self.states.discard_gradients()
        self._losses.forget()
        self._reporter.take_tokens()
        self.progress.drop_window()

    def gradient_divisor(self) -> int | torch.Tensor:
        """What summed gradients are divided by, once they are reduced.

        It is the size of ``data`` times accumulation steps; a window that has grown beyond
        :meth:`set_train_batch_size` is divided by what is in it. Where losses have weights it is
        their sum over ``data``, a 0-d tensor that takes a collective; infinite if that is 0.
        """
        if self.states.weighted:
            return total_weight(self.job, self._losses.weight, averages=self._averages)
        # Parts of a sequence are averaged in any case, data shards only if the config says so.
        parts = self.job.mesh.size("data" if self._averages else "sp")
        return self._accumulation.window_steps * parts

    # -- what happened ------------------------------------------------------------------------

    def get_global_grad_norm(self) -> float | None:
        """Norm of the latest step's gradient before clipping.

        ``None`` before the first step and after a skipped one. Without clipping nothing else needs
        the norm, so it is computed from the first call on, and that first call returns ``None``.
        """
        self._norm_wanted = True
        return None if self._norm is None else float(self._norm)

    def wants_gradient_norm(self) -> bool:
        """Whether the step under way has to compute the norm."""
        return (
            self._norm_wanted
            or self._clipping > 0
            or self.precision.check_finite
            or self._reporter.prints(self.global_steps + 1)
        )

    def record_gradient_norm(self, norm: torch.Tensor | None) -> None:
        """Keep the norm of the step under way, for reports."""
        self._norm = norm
        self._losses.note_norm(norm)

    def record_divisor(self, divisor: torch.Tensor) -> None:
        """Have the next step look at a divisor that the step under way does not wait for."""
        self._losses.note_divisor(divisor)

    def overflowed(self) -> bool:
        """Whether the latest boundary skipped its update because gradients were not finite."""
        return self.global_steps > 0 and not self._applied

    def was_step_applied(self) -> bool:
        """Whether the latest boundary updated the parameters."""
        return self._applied

    @property
    def device(self) -> torch.device:
        """The device that the module computes on."""
        return self.job.device

    def compile(self, backend: str = "inductor", **kwargs: Any) -> None:
        """Compile every repeated block of the module in place, or the module if it has none."""
        from drivetrain.states.units import units

        for unit in units(self.module):
            # Not the module's hooks: those that gather parameters stay outside of graphs.
            forward = torch.compile(unit.module.forward, backend=backend, **kwargs)
            unit.module.forward = forward

    def rebuild(self) -> None:
        """Adapt states to changed ``requires_grad``, on every rank; the window begins again."""
        rebuild = self.states.rebuild  # refused here while they are away, before all else
        check_same_model(self.job, self.module, self._groups())
        refuse_kept_elsewhere(self.job, self.module, self._groups(), self.states)
        rebuild()
        self.drop_window()

    def module_state_dict(self, **kwargs: Any) -> dict[str, Any]:
        """The whole model's ``state_dict``, whichever rank has what. Collective: all call it."""
        return of_all_ranks(self.job, self.module, whole_state_dict(self.module, **kwargs))

    def load_module_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> None:
        """Load the module's ``state_dict``, the same on every rank; masters follow. Collective."""
        with whole(self.module, write_rank=0):
            load_own(self.job, self.module, state_dict, strict=strict)
        self.states.refresh()

    def save_checkpoint(self, save_dir: str, tag: str | None = None, *rest: Any, **kw: Any) -> str:
        """See :func:`drivetrain.checkpoint.save`."""
        return checkpoint.save(self, save_dir, tag, *rest, **kw)

    def load_checkpoint(
        self, load_dir: str, tag: str | None = None, **kwargs: Any
    ) -> tuple[str | None, dict[str, Any] | None]:
        """See :func:`drivetrain.checkpoint.load`."""
        return checkpoint.load(self, load_dir, tag, **kwargs)

    def deepspeed_io(self, dataset: Any, **kwargs: Any) -> DataLoader:
        """A loader over ``dataset`` for this engine's data shard."""
        return build_loader(self.job, dataset, self.batch, **kwargs)

    def destroy(self) -> None:
        """Remove every hook from the module and free the states."""
        self.states.detach()
        while self._on_destroy:
            self._on_destroy.pop()()

    def on_destroy(self, release: Callable[[], object]) -> None:
        """Call ``release`` when the engine is destroyed, in reverse order of registration."""
        self._on_destroy.append(release)

    # -- internals ----------------------------------------------------------------------------

    def _lacks(self, name: str) -> str:
        """What an attribute error says; a suggestion by likeness would make ``hasattr`` slow."""
        hint = f"; in its place: {ENGINE[name]}" if name in ENGINE else ""
        module = type(self.module).__name__
        return f"neither the engine nor its module {module} has an attribute {name!r}{hint}"

    def _run_backward(
        self,
        tensors: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor | None],
        retain_graph: bool,
        last: bool | None,
    ) -> None:
        self._begin_backward(last)
        with self._window.announced(), self.job.span("backward"):
            self.job.hub.backward(self, tensors, gradients, retain_graph)

    def _begin_backward(self, last: bool | None = None) -> None:
        self._window.settle()
        last = self._accumulation.completes() if last is None else last
        self.states.begin_backward(last=last and self._reducing, local=not self._reducing)

    def _unannounced_begins(self) -> None:
        self._begin_backward()
        if not self._scaled.runs:
            if self.loss_scaler.active:
                raise TrainingError(
                    "loss.backward() without loss scaling: with fp16 call engine.backward(loss), "
                    "or engine.scale(loss).backward()"
                )
            self._scaled.is_plain()
            self._declare(weighted=False)

    def _begin_loss(
        self, loss: torch.Tensor, weight: float | torch.Tensor | None, *, divided: bool
    ) -> torch.Tensor:
        """Check a loss, note it, and return what backward starts from."""
        self._require_optimizer("run backward")
        check_loss(loss)
        factor = self._accumulation.counted_steps if divided else 1
        weight = checked_weight(weight)
        self._declare(weighted=weight is not None)
        self._losses.add(loss, self.states.why_not_finite, factor, weight)
        scaled = self._scaled.scale(self.loss_scaler, loss, weight)
        return scaled * factor if factor > 1 else scaled

    def _declare(self, weighted: bool) -> None:
        """Note if a loss has a weight; all of a window have, or none."""
        if self.states.weighted not in (None, weighted):
            raise TrainingError(
                "some losses of this window have weights and others have none: call "
                "engine.backward(loss, weight=...), or engine.scale(loss, weight), for all of them"
            )
        self.states.weighted = weighted

    def _require_optimizer(self, what: str) -> EngineOptimizer:
        if self.optimizer is None:
            raise TrainingError(f"this engine has no optimizer, so it cannot {what}")
        return self.optimizer

    def _end_window(self, rates: Sequence[float], lr_kwargs: dict[str, Any] | None) -> None:
        if self._applied and self.lr_scheduler is not None:
            self.lr_scheduler.step(**(lr_kwargs or {}))
        samples, steps = self._accumulation.window_samples, self._accumulation.window_steps
        self.progress.end_micro_batches(1)
        tokens = self._reporter.tokens_of_step(self.job)
        self.progress.end_step(samples=samples, tokens=tokens, applied=self._applied)
        loss = self._reporter.mean_loss(self, *self._losses.take(), steps)
        self.last_report = self._reporter.report(
            self, rates=rates, samples=samples, tokens=tokens, loss=loss, norm=self._norm
        )
        self.job.hub.step_end(self, self.last_report)
