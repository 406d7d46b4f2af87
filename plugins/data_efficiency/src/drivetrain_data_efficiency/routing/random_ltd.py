"""Random layer-wise token dropping: layers see a random part of each sequence's tokens.

Yao et al. 2022, "Random-LTD: Random and Layerwise Token Dropping Brings Efficient Training for
Large-scale Transformers", https://arxiv.org/abs/2211.11586.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from drivetrain.contracts import Purpose, Tag
from drivetrain.errors import ConfigError, TrainingError
from drivetrain.states.units import Unit, units
from drivetrain_data_efficiency.decay import rate_at
from drivetrain_data_efficiency.routing.arguments import Cut, Forward, unbatched
from drivetrain_data_efficiency.routing.draw import draw, kept_tokens
from drivetrain_data_efficiency.routing.tokens import gather_tokens, scatter_tokens

if TYPE_CHECKING:
    from torch import nn

    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job
    from drivetrain_data_efficiency.section import RandomLtdSection

PATH = "data_efficiency.data_routing.random_ltd"

of_job: WeakKeyDictionary[Job, RandomLtd] = WeakKeyDictionary()
"""What drops tokens in the engine of a job."""

layer_classes: WeakKeyDictionary[nn.Module, type[nn.Module]] = WeakKeyDictionary()
"""Models of which a script has named the class of layers."""


class RandomLtd:
    """Drops tokens in the layers of one engine, and counts what layers have seen.

    **Which tokens.** Those kept of a sample are a function of seed, step, layer, and the sample's
    place in the global batch. So ranks with different samples keep different tokens, ranks that
    share a forward (tensor parallelism) the same, and neither recomputation nor a resume nor
    another number of ranks changes them. Where a layer is given a table by token without a batch
    dimension, all samples of a round keep the same.

    **Counting.** The layer tokens of a forward are ``b (k n + s (L - n))`` with n of L layers that
    keep k of s tokens; those of a step are the sum over micro-batches and data shards.

    Args:
        job: mesh, counters.
        section: layers and schedule.
        seed: of draws.
        varying: whether micro-batches differ in size between ranks.
    """

    def __init__(self, job: Job, section: RandomLtdSection, seed: int, varying: bool) -> None:
        self._job, self._section, self._seed, self._varying = job, section, seed, varying
        self.consumed = 0
        """Layer tokens of all steps before, over all ranks."""
        self.layers: list[Unit] = []
        self.total = 0
        self._window: dict[int, int] = {}
        job.values.declare("random_ltd_kept_tokens")

    def current(self) -> int:
        """Tokens kept of a longer sequence at the step under way."""
        assert self._section.random_ltd_schedule is not None
        return kept_tokens(self._job.progress.steps, self._section.random_ltd_schedule)

    # -- setting up -----------------------------------------------------------------------------

    def apply(self, module: nn.Module) -> nn.Module:
        """Have the chosen layers drop tokens.

        Raises:
            ConfigError: the config names layers that the model does not have.
        """
        found = _layers(module)
        self.total = len(found)
        chosen = self._chosen(found)
        for number, unit in chosen:
            self.layers.append(unit)
            inner = unit.module.forward
            unit.module.forward = self._dropping(number, unit, inner)
        return module

    def _chosen(self, found: Sequence[Unit]) -> list[tuple[int, Unit]]:
        section, total = self._section, len(found)
        if section.total_layer_num not in (None, total):
            names = ", ".join(unit.name for unit in (found[0], found[-1]))
            raise ConfigError(
                f"{PATH}.total_layer_num is {section.total_layer_num}, but the model has {total} "
                f"layers (from {names}); leave it out to have them counted"
            )
        numbers = section.random_ltd_layer_id
        if numbers is None:
            numbers = tuple(range(1, total - 1))
        if not numbers or max(numbers) >= total:
            raise ConfigError(
                f"{PATH}.random_ltd_layer_id {list(numbers)}: the model has the layers 0 to "
                f"{total - 1}, of which all but the first and the last drop if it is left out"
            )
        if section.random_ltd_layer_num not in (None, len(numbers)):
            raise ConfigError(
                f"{PATH}.random_ltd_layer_num is {section.random_ltd_layer_num}, but "
                f"{len(numbers)} layers drop tokens"
            )
        return [(number, found[number]) for number in sorted(numbers)]

    # -- forward ----------------------------------------------------------------------------------

    def _dropping(self, number: int, unit: Unit, inner: Forward) -> Forward:
        names = _positional(inner)

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            name = _hidden_name(unit, names, args, kwargs)
            hidden: torch.Tensor = given[name]
            swapped = self._section.hidden_state_order == "seq_batch_dim"
            hidden = hidden.transpose(0, 1) if swapped else hidden
            batch, length = hidden.shape[:2]
            kept = min(self.current(), length)
            if not unit.module.training:
                return inner(*args, **kwargs)
            if unit is self.layers[0]:
                self._count(batch, length, kept)
            if kept == length:
                return inner(*args, **kwargs)
            _check_window(unit, given, length)
            rest = {key: value for key, value in given.items() if key != name}
            places = self._places(number, hidden, kept, unbatched(rest, length, batch))
            few = gather_tokens(hidden, places)
            cut = Cut(places, length, self._section.model_mask_name)
            less = {key: cut(key, value) for key, value in rest.items()}
            less[name] = few.transpose(0, 1) if swapped else few
            own = names[: len(args)]
            output = inner(*(less[key] for key in own), **{key: less[key] for key in kwargs})
            return _with_first(output, lambda new: _put(hidden, places, new, swapped), unit)

        return forward

    def _places(self, number: int, hidden: torch.Tensor, kept: int, shared: bool) -> torch.Tensor:
        progress, mesh = self._job.progress, self._job.mesh
        batch, length = hidden.shape[:2]
        if shared:
            rows = torch.full((batch,), -1 - progress.in_window, device=hidden.device)
        else:
            first = (progress.in_window * mesh.size("dp") + mesh.coordinate("dp")) * batch
            rows = torch.arange(first, first + batch, device=hidden.device)
        return draw((self._seed, progress.steps, number), rows, length, kept)

    def _count(self, batch: int, length: int, kept: int) -> None:
        """Note a forward; a recomputation of it, or a second one, takes its place."""
        n = len(self.layers)
        tokens = batch * (kept * n + length * (self.total - n))
        self._window[self._job.progress.in_window] = tokens
        told = torch.tensor(float(kept), device=self._job.device)
        self._job.values.add("random_ltd_kept_tokens", told)

    # -- steps ------------------------------------------------------------------------------------

    def rate_factor(self) -> float:
        """Factor on the learning rate of the step under way, by layer tokens before it."""
        rate = self._section.layer_token_lr_schedule
        if not rate.enabled:
            return 1.0
        assert rate.total_layer_tokens is not None
        total, warmup = rate.total_layer_tokens, rate.warmup_layer_tokens
        return rate_at(self.consumed, total=total, warmup=warmup, decay=rate.decay_type)

    def end_step(self) -> None:
        """Add what the layers of all data shards have seen; collective if sizes vary."""
        own = sum(self._window.values())
        self._window.clear()
        if self._varying and self._job.mesh.size("dp") > 1:
            total = torch.tensor(own, dtype=torch.int64, device=self._job.device)
            tag = Tag(Purpose.CONTROL, site="layer tokens of a step")
            self._job.communicator.all_reduce(total, "dp", tag)
            self.consumed += int(total)
        else:
            self.consumed += own * self._job.mesh.size("dp")


def consumed_layer_tokens(engine: Engine) -> int:
    """Layer tokens of all steps of an engine, over all ranks; 0 if it drops no tokens."""
    dropping = of_job.get(engine.job)
    return 0 if dropping is None else dropping.consumed


def _layers(module: nn.Module) -> list[Unit]:
    named = layer_classes.get(module)
    if named is not None:
        found = [Unit(n, m) for n, m in module.named_modules() if isinstance(m, named)]
        if not found:
            raise ConfigError(f"{PATH}: the model has no layer of the class {named.__name__}")
        return found
    found = units(module)
    if len(found) == 1 and found[0].module is module:
        raise ConfigError(
            f"{PATH}: {type(module).__name__} has no repeated blocks (children of one class in a "
            "ModuleList or Sequential), so there are no layers to drop tokens in"
        )
    return found


def _positional(forward: Forward) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in inspect.signature(forward).parameters.values() if p.kind in kinds]
    return names + [f"argument {n}" for n in range(len(names), 32)]  # of *args


def _hidden_name(
    unit: Unit, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> str:
    name = names[0] if args else "hidden_states" if "hidden_states" in kwargs else names[0]
    value = args[0] if args else kwargs.get(name)
    if not isinstance(value, torch.Tensor) or value.dim() != 3 or not value.is_floating_point():
        shown = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise TrainingError(
            f"{PATH}: the first argument of the layer {unit.name} is no hidden state [batch, "
            f"sequence, width] but {shown}; choose other layers with random_ltd_layer_id"
        )
    return name


def _check_window(unit: Unit, given: Mapping[str, Any], length: int) -> None:
    """Refuse a window that the layer counts in tokens that it sees, of which some are dropped."""
    for part in unit.module.modules():
        window = getattr(part, "sliding_window", None)
        if isinstance(window, int) and window < length and given.get("attention_mask") is None:
            raise TrainingError(
                f"{PATH}: the layer {unit.name} attends within a window of {window} tokens that it "
                "counts itself, so it would reach further when tokens are dropped: use "
                "attn_implementation sdpa or eager, which have the window in their mask"
            )


def _put(
    hidden: torch.Tensor, places: torch.Tensor, new: torch.Tensor, swapped: bool
) -> torch.Tensor:
    new = new.transpose(0, 1) if swapped else new
    whole = scatter_tokens(hidden.to(new.dtype), places, new)
    return whole.transpose(0, 1) if swapped else whole


def _with_first(output: Any, put: Any, unit: Unit) -> Any:
    """An output whose hidden state, the first of several, has all tokens again."""
    if isinstance(output, torch.Tensor):
        return put(output)
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], torch.Tensor):
        rest = [put(output[0]), *output[1:]]
        if hasattr(output, "_fields"):
            return type(output)(*rest)
        return type(output)(rest)
    raise TrainingError(
        f"{PATH}: the layer {unit.name} returns {type(output).__name__}; what can be handled is a "
        "tensor, or a tuple that begins with the hidden state"
    )
