"""A dense model becomes a mixture of experts: sparse upcycling.

Komatsuzaki et al. 2022, "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints"
(arXiv 2212.05055): each expert of a layer starts as a copy of the dense layer, and the router is
new. Where the weights of a token add up to 1, the new model computes what the dense one did.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from drivetrain.errors import ConfigError
from drivetrain.job.job import open_jobs
from drivetrain_moe.layer import MoE

_ALIKE = 1e-9
"""How far float64 outputs of a token may be apart, by what other tokens are computed with it."""


@dataclass(frozen=True)
class FoundMLP:
    """A feed-forward layer of a dense model.

    Args:
        name: its path in the model.
        module: itself.
        width: of tokens, d.
        inner: width inside, f.
    """

    name: str
    module: nn.Module
    width: int
    inner: int


class UpcycledMLP(MoE):
    """A :class:`MoE` that stands where a dense layer was: it returns the output alone.

    The balancing loss enters the loss by itself, with the weight ``balance_loss``.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Compute tokens [..., d]."""
        output: torch.Tensor = super().forward(hidden_states)[0]
        return output


def find_mlps(model: nn.Module, layers: str | None = None) -> list[FoundMLP]:
    """Find the feed-forward layers of ``model``, in order of the model's modules.

    A module is one if it has two matrices (d to f to d) or three (two of d to f, for a gate), no
    other parameters than their biases, and a forward of one tensor that computes each token by
    itself. That is tried out, with random weights on a copy. Narrow ones (f < d), such as
    adapters, are found by name only.

    Args:
        model: whose modules are looked at; nothing inside of a layer that is found or is a
            :class:`MoE` already.
        layers: regular expression that their names match as a whole.

    Raises:
        ConfigError: a module that ``layers`` names is no such layer; says why.
    """
    found: list[FoundMLP] = []
    inside: list[str] = []
    tried: dict[Any, tuple[int, int] | str] = {}
    for name, module in model.named_modules():
        if not name or any(name.startswith(f"{other}.") for other in inside):
            continue
        if isinstance(module, MoE):
            inside.append(name)
        if layers is not None and not re.fullmatch(layers, name):
            continue
        key = (type(module), *((n, p.shape) for n, p in module.named_parameters()))
        if isinstance(module, nn.Sequential):
            key = (id(module),)  # its type does not say what it computes
        if key not in tried:
            tried[key] = _widths(module)
        widths = tried[key]
        if isinstance(widths, str):
            if layers is not None:
                raise ConfigError(f"upcycle: layers: {name} ({type(module).__name__}) {widths}")
        elif layers is not None or widths[1] >= widths[0]:
            found.append(FoundMLP(name, module, *widths))
            inside.append(name)
    return found


def upcycle(
    model: nn.Module,
    num_experts: int | Sequence[int],
    k: int = 2,
    *,
    layers: str | None = None,
    ep_size: int = 1,
    use_residual: bool = False,
    balance_loss: float = 0.01,
    router_std: float = 0.02,
    reinitialise: float = 0.0,
    seed: int = 0,
    **options: Any,
) -> dict[str, UpcycledMLP]:
    """Replace feed-forward layers of a dense ``model`` by mixtures of their copies, in place.

    With k > 1 the model computes what it did before, in training too, since weights of a token add
    up to 1 and no token is dropped (by default). With k = 1 a weight of 1 would leave the router
    without a gradient, so weights are scores times the number of experts: near 1, as the router is
    small. ``normalise=True`` has exactly 1 there.

    Names of parameters: below the name of the layer are ``gate.weight`` [E, d],
    ``experts.N.NAME`` with each NAME of the dense layer, and for ``use_residual``
    ``residual.NAME``, ``coefficient.weight`` and ``coefficient.bias``. All others stay.

    Args:
        model: with the values of the dense checkpoint; before ``initialize``.
        num_experts: of each layer; or a list with one number for each layer that is found, for a
            pyramid (PR-MoE), where 0 leaves a layer dense.
        k: experts of a token.
        layers: regular expression of the names of the layers to replace; by default all that
            :func:`find_mlps` finds.
        ep_size: ranks that share out the experts of a layer.
        use_residual: keep the dense layer beside, both weighed by a learnt softmax (PR-MoE).
        balance_loss: weight with which the balancing loss enters the loss.
        router_std: standard deviation of the router's first weights.
        reinitialise: part of the inner neurons of each expert that are drawn anew, from a normal
            distribution with the mean and deviation of those that they replace (Nakamura et al.
            2025, "Drop-Upcycling", arXiv 2502.19261). Outputs then are no longer the dense ones.
        seed: of all that is drawn; the same on every rank.
        options: further arguments of :class:`MoE`; ``drop_tokens`` is ``False`` by default.

    Returns:
        Name of each replaced layer -> what stands there now.

    Raises:
        ConfigError: no layer was found, ``layers`` names something else, numbers do not fit
            together, or parameters have no values or are an engine's. The model is then unchanged.
    """
    _refuse_engines(model)
    found = find_mlps(model, layers)
    if not found:
        raise ConfigError(_nothing_found(model, layers))
    counts = _counts(num_experts, found)
    if not 0 <= reinitialise <= 1:
        raise ConfigError(f"upcycle: reinitialise = {reinitialise} is not from 0 to 1")
    options.setdefault("drop_tokens", False)
    options.update(k=k, ep_size=ep_size, use_residual=use_residual, balance_loss=balance_loss)
    generator = torch.Generator().manual_seed(seed)
    new: dict[str, UpcycledMLP] = {}
    old: dict[nn.Module, UpcycledMLP] = {}
    for mlp, count in zip(found, counts, strict=True):
        if not count:
            continue
        layer = _built(mlp, count, options)
        with torch.no_grad():
            _draw(layer.gate.weight, 0.0, router_std, generator)
            if layer.coefficient is not None:
                _draw(layer.coefficient.weight, 0.0, router_std, generator)
                layer.coefficient.bias.zero_()
            for expert in layer.experts.values() if reinitialise else ():
                _redraw(mlp, expert, reinitialise, generator)
        new[mlp.name] = old[mlp.module] = layer
    # A layer that is used in two places stays one.
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in old:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, old[module])
    return new


def _built(mlp: FoundMLP, count: int, options: Mapping[str, Any]) -> UpcycledMLP:
    """A layer of ``count`` copies of ``mlp``, where and of what kind it is."""
    _refuse_without_values(mlp)
    k = options["k"]
    normalise = options.get("normalise", k > 1)
    first = {"normalise": normalise, "scale": 1.0 if normalise else float(count)}
    try:
        layer = UpcycledMLP(mlp.width, mlp.module, count, **{**first, **options})
    except ConfigError as error:
        raise ConfigError(f"upcycle: {mlp.name}: {error}") from error
    like = next(mlp.module.parameters())
    return layer.to(device=like.device, dtype=like.dtype).train(mlp.module.training)


def _widths(module: nn.Module) -> tuple[int, int] | str:
    """(d, f) of a feed-forward layer, or why the module is none."""
    shapes = _matrices(module)
    if isinstance(shapes, str):
        return shapes
    needed = [
        p.name
        for p in inspect.signature(module.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(needed) != 1:
        return f"has a forward of ({', '.join(needed)}), not of one tensor"
    reason = "has matrices that do not go from a width to another and back"
    for width, inner in _pairs(shapes):
        reason = _computes_tokens(module, width)
        if not reason:
            return width, inner
    return reason


def _matrices(module: nn.Module) -> list[tuple[int, int]] | str:
    """The shapes of the two or three matrices of a module, or why it has others."""
    shapes: list[tuple[int, int]] = []
    for part in module.modules():
        own = [p.shape for p in part.parameters(recurse=False)]
        flat = [shape for shape in own if len(shape) == 2]
        if own and (len(flat) != 1 or any(len(shape) > 2 for shape in own) or len(own) > 2):
            return f"has a {type(part).__name__} with parameters of shapes {_text(own)}"
        shapes += [(shape[0], shape[1]) for shape in flat]
    if len(shapes) not in (2, 3):
        return f"has {len(shapes)} matrices; a feed-forward layer has 2, or 3 with a gate"
    return shapes


def _pairs(shapes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Each (d, f) which matrices of ``shapes`` can have: all d x f, or one d x 2f, for a gate."""
    found = []
    for d in dict.fromkeys(shapes[0]):
        for f in dict.fromkeys(size for shape in shapes for size in shape):
            plain = [sorted(shape) == sorted((d, f)) for shape in shapes]
            double = [sorted(shape) == sorted((d, 2 * f)) for shape in shapes]
            fused = len(shapes) == 2 and any(
                plain[i] and double[1 - i] and not plain[1 - i] for i in (0, 1)
            )
            if all(plain) or fused:
                found.append((d, f))
    return found


def _computes_tokens(module: nn.Module, width: int) -> str:
    """Why a module does not compute each token [d] by itself; the empty string if it does."""
    generator = torch.Generator().manual_seed(0)
    # A copy, since values may be missing or zero, in which case outputs would say nothing.
    with torch.no_grad():
        probe = copy.deepcopy(module)
        meta = any(p.is_meta for p in probe.parameters())
        probe = (probe.to_empty(device="cpu") if meta else probe.cpu()).double().eval()
        for parameter in probe.parameters():
            scale = parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        x = torch.randn(1, 4, width, generator=generator).double()
        try:
            together, alone = probe(x), probe(x[:, 1:2])
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            return f"does not compute tokens of width {width}: {error}"
    if not isinstance(together, torch.Tensor) or together.shape != x.shape:
        return f"does not return one tensor of the shape that it is given, {tuple(x.shape)}"
    if not torch.allclose(together[:, 1:2], alone, rtol=_ALIKE, atol=_ALIKE):
        return "does not compute each token by itself: other tokens change what one becomes"
    return ""


def _counts(num_experts: int | Sequence[int], found: Sequence[FoundMLP]) -> list[int]:
    if isinstance(num_experts, int):
        counts = [num_experts] * len(found)
        if num_experts < 1:
            raise ConfigError(f"upcycle: num_experts = {num_experts} is below 1")
        return counts
    counts = list(num_experts)
    if len(counts) != len(found):
        names = ", ".join(mlp.name for mlp in found)
        raise ConfigError(
            f"upcycle: num_experts has {len(counts)} numbers for {len(found)} layers: {names}"
        )
    if min(counts) < 0 or not any(counts):
        raise ConfigError(f"upcycle: num_experts = {counts} has no layer with experts, or less")
    return counts


def _refuse_engines(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        sharded = hasattr(parameter, "drivetrain_handle")
        if sharded or any(parameter in job.parameters for job in open_jobs()):
            raise ConfigError(
                f"upcycle: {name} is {'sharded (zero.Init)' if sharded else 'in an engine'}: call "
                "upcycle before initialize, on a model with whole parameters"
            )


def _refuse_without_values(mlp: FoundMLP) -> None:
    for name, parameter in mlp.module.named_parameters():
        if parameter.is_meta:
            raise ConfigError(
                f"upcycle: {mlp.name}.{name} has no values (meta device): load the dense "
                "checkpoint first"
            )


def _redraw(mlp: FoundMLP, expert: nn.Module, part: float, generator: torch.Generator) -> None:
    """Draw a random ``part`` of an expert's inner neurons anew, in all its matrices."""
    f = mlp.inner
    if f == mlp.width:
        raise ConfigError(
            f"upcycle: reinitialise: {mlp.name} is {f} wide inside and outside, so that its inner "
            "neurons cannot be told apart by shape"
        )
    neurons = torch.randperm(f, generator=generator)[: round(part * f)]
    for matrix in expert.parameters():
        if matrix.dim() != 2 or not len(neurons):
            continue
        dim = next(i for i, size in enumerate(matrix.shape) if size != mlp.width)
        index = torch.cat([neurons + at for at in range(0, matrix.shape[dim], f)]).to(matrix.device)
        chosen = matrix.index_select(dim, index)
        spread = chosen.float().std(correction=0).item()
        _draw(chosen, chosen.float().mean().item(), spread, generator)
        matrix.index_copy_(dim, index, chosen)


def _draw(into: torch.Tensor, mean: float, std: float, generator: torch.Generator) -> None:
    """Fill a tensor on any device with normal numbers of a generator on the CPU."""
    into.copy_(torch.randn(into.shape, generator=generator) * std + mean)


def _nothing_found(model: nn.Module, layers: str | None) -> str:
    kind = type(model).__name__
    if layers is not None:
        names = [mlp.name for mlp in find_mlps(model)]
        hint = f"feed-forward layers are {', '.join(names[:4])}" if names else "it has none"
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        return f"upcycle: no module of {kind} has a name that matches {layers!r}; {hint}{more}"
    return (
        f"upcycle: {kind} has no module that looks like a feed-forward layer: two or three "
        "matrices, from a width to a wider one and back, and a forward of one tensor; put the "
        "matrices of a layer into a module of their own, or place drivetrain_moe.MoE"
    )


def _text(shapes: Iterable[Iterable[int]]) -> str:
    return ", ".join(str(tuple(shape)) for shape in shapes)
