"""Profiling a model by hand: :class:`FlopsProfiler`, and :func:`get_model_profile`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from drivetrain.errors import TrainingError
from drivetrain_profiler.counter import OperationCounter
from drivetrain_profiler.measured import ModuleFigures, ModuleTimer, figures, watched
from drivetrain_profiler.places import ModuleHooks
from drivetrain_profiler.report import Summary, duration, profile_text, scaled


class FlopsProfiler:
    """Counts and times what runs between :meth:`start_profile` and :meth:`stop_profile`.

    Both at once, so times contain the counting, some microseconds an operator;
    :func:`get_model_profile` and the section ``flops_profiler`` count and time in turn.

    Args:
        model: what is profiled; it stays as it is.
        ds_engine: an engine whose job's device is waited for; the model's device without.
        recompute_fwd_factor: has no effect, since what backward computes again is counted.
    """

    def __init__(
        self, model: nn.Module, ds_engine: Any = None, recompute_fwd_factor: float = 0.0
    ) -> None:
        self.model = model
        self._wait = (
            waits_for(model) if ds_engine is None else ds_engine.job.accelerator.synchronize
        )
        self._ignored: Sequence[type[nn.Module]] = ()
        self._hooks: ModuleHooks | None = None
        self.reset_profile()

    def start_profile(
        self, ignore_list: Sequence[type[nn.Module]] | None = None, *, count: bool = True
    ) -> None:
        """Begin; calls in between are added up.

        Args:
            ignore_list: classes of modules whose operations are left out.
            count: whether operations are counted; times are taken in any case.

        Raises:
            TrainingError: it has begun already.
        """
        if self._hooks is not None:
            raise TrainingError("the profile has begun already: call stop_profile() first")
        self._ignored = tuple(ignore_list or ())
        self._counting = count
        self._hooks = watched(self.model, self.counter if count else None, self.timer)
        if count:
            self.counter.__enter__()  # type: ignore[no-untyped-call]

    def stop_profile(self) -> None:
        """Stop; figures stay. May be called repeatedly."""
        if self._hooks is not None:
            if self._counting:
                self.counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._hooks.remove()
            self._hooks = None

    def reset_profile(self) -> None:
        """Forget all figures."""
        self.counter, self.timer = OperationCounter(), ModuleTimer(self._wait)

    def end_profile(self) -> None:
        """Stop, and forget all figures."""
        self.stop_profile()
        self.reset_profile()

    @property
    def figures(self) -> ModuleFigures:
        """All that was measured, as a tree of modules."""
        return figures(self.model, self.counter, self.timer, self._ignored)

    def get_total_flops(self, as_string: bool = False) -> int | str:
        """Floating-point operations of forward."""
        flops = self.figures.forward.flops
        return scaled(flops, "FLOPs") if as_string else flops

    def get_total_macs(self, as_string: bool = False) -> int | str:
        """Multiply-accumulates of forward."""
        macs = self.figures.forward.macs
        return scaled(macs, "MACs") if as_string else macs

    def get_total_params(self, as_string: bool = False) -> int | str:
        """Numbers in the model's parameters."""
        parameters = self.figures.parameters
        return scaled(parameters) if as_string else parameters

    def get_total_duration(self, as_string: bool = False) -> float | str:
        """Seconds in forward."""
        seconds = self.figures.seconds
        return duration(seconds) if as_string else seconds

    def print_model_profile(
        self,
        profile_step: int = 1,
        module_depth: int = -1,
        top_modules: int = 1,
        detailed: bool = True,
        output_file: str | Path | None = None,
    ) -> None:
        """Write the report to a file, or to standard output."""
        summary = Summary(f"profile of step {profile_step}", unknown=self.counter.unknown)
        text = profile_text(
            self.figures, summary, depth=module_depth, top=top_modules, detailed=detailed
        )
        write(text, output_file)

    def print_model_aggregated_profile(self, module_depth: int = -1, top_modules: int = 1) -> None:
        """Write the largest modules of each depth to standard output."""
        self.print_model_profile(1, module_depth, top_modules, detailed=False)


def get_model_profile(
    model: nn.Module,
    input_shape: Sequence[int] | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    print_profile: bool = True,
    detailed: bool = True,
    module_depth: int = -1,
    top_modules: int = 1,
    warm_up: int = 1,
    as_string: bool = True,
    output_file: str | Path | None = None,
    ignore_modules: Sequence[type[nn.Module]] | None = None,
    mode: Literal["forward", "generate"] = "forward",
) -> tuple[int | str, int | str, int | str]:
    """Profile one call of a model, in evaluation mode and without gradients.

    Args:
        model: called ``warm_up + 2`` times: to warm up, to take times, to count.
        input_shape: shape of one input, which is made of the model's dtype, in place of ``args``.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        print_profile: whether the report is written.
        detailed: whether the model with figures is part of it.
        module_depth: down to which depth modules are listed; -1 for the deepest.
        top_modules: how many of each depth are listed as the largest.
        warm_up: calls before anything is measured.
        as_string: return ``"1.50 GMACs"`` in place of numbers.
        output_file: where the report goes; standard output without.
        ignore_modules: classes of modules whose operations are left out.
        mode: call the model, or its ``generate``.

    Returns:
        Floating-point operations, multiply-accumulates, and parameters.

    Raises:
        TrainingError: neither or both of ``input_shape`` and arguments are given, or the mode is
            unknown.
    """
    call = _call(model, input_shape, args, dict(kwargs or {}), mode)
    profiler = FlopsProfiler(model)
    trained = model.training
    model.eval()
    try:
        with torch.no_grad():
            for _ in range(warm_up):
                call()
            profiler.start_profile(count=False)
            call()
            profiler.stop_profile()
            taken = profiler.timer
            profiler.reset_profile()
            profiler.start_profile(ignore_modules)
            call()
    finally:
        profiler.stop_profile()
        model.train(trained)
    profiler.timer = taken
    if print_profile:
        profiler.print_model_profile(1, module_depth, top_modules, detailed, output_file)
    return (
        profiler.get_total_flops(as_string),
        profiler.get_total_macs(as_string),
        profiler.get_total_params(as_string),
    )


def _call(
    model: nn.Module,
    input_shape: Sequence[int] | None,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    mode: str,
) -> Callable[[], Any]:
    if mode not in ("forward", "generate"):
        raise TrainingError(f"mode is {mode!r}; a model can be profiled in 'forward' or 'generate'")
    if (input_shape is None) == (not args and not kwargs):
        raise TrainingError("give either input_shape or the arguments of the call: args, kwargs")
    if input_shape is not None:
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        args = [torch.ones(tuple(input_shape), dtype=like.dtype, device=like.device)]
    called: Any = model if mode == "forward" else model.generate
    return lambda: called(*args, **kwargs)


def waits_for(model: nn.Module) -> Callable[[], None]:
    """What waits for the device of a model."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type in ("cpu", "meta"):
        return lambda: None
    found: Callable[[], None] = torch.get_device_module(device).synchronize
    return found


def write(text: str, file: str | Path | None) -> None:
    """Write a report to a file, or to standard output."""
    if file is None:
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(text, "utf-8")
