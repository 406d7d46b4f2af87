"""Two models beside each other: size, error of each layer, perplexity, speed; as text and SVG."""

from __future__ import annotations

import html
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from drivetrain.errors import ConfigError
from drivetrain.states.units import units
from drivetrain_compression.calibrated.data import read_batches
from drivetrain_compression.calibrated.first_inputs import Batch
from drivetrain_compression.files.loading import load_compressed


@dataclass(frozen=True)
class Side:
    """One of two models.

    Args:
        name: of its folder.
        megabytes: of its weights' files.
        perplexity: on the data; ``None`` without data.
        tokens_a_second: of a forward pass over the data; ``None`` without data.
    """

    name: str
    megabytes: float
    perplexity: float | None = None
    tokens_a_second: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Two models, and how far their layers are apart.

    Args:
        sides: the first one is what the second is measured by.
        weights: relative distance of the weights of layers in both, by name.
        outputs: relative distance of what blocks return on the data, by name; empty without data.
    """

    sides: tuple[Side, Side]
    weights: dict[str, float]
    outputs: dict[str, float]


def compared(
    first: Path, second: Path, data: Path | None, *, samples: int, length: int
) -> Comparison:
    """Measure two folders.

    Raises:
        ConfigError: one cannot be opened, or they have no layer in common.
    """
    batches: list[Batch] = []
    if data is not None:
        batches = read_batches(data, first, samples=samples, length=length, rows=4)
    folders = (first, second)
    one, two = models = [load_compressed(folder) for folder in folders]
    with torch.inference_mode():
        for model in models:  # Transformers unpacks layers when they are called first
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64))
    weights = _distances(one, two)
    if not weights:
        raise ConfigError(f"{first} and {second} have no linear layer of one name and shape")
    outputs = _block_distances(one, two, batches[0]) if batches else {}
    sides = [_side(f, model, batches) for f, model in zip(folders, models, strict=True)]
    return Comparison((sides[0], sides[1]), weights, outputs)


def table(found: Comparison) -> str:
    """The comparison as text."""
    one, two = found.sides
    lines = [f"{'':22}{one.name[:24]:>26}{two.name[:24]:>26}{'change':>10}"]
    for title, key in (
        ("weights, MB", "megabytes"),
        ("perplexity", "perplexity"),
        ("tokens/s, forward", "tokens_a_second"),
    ):
        a, b = getattr(one, key), getattr(two, key)
        if a is not None and b is not None:
            lines.append(f"{title:22}{a:>26,.2f}{b:>26,.2f}{b / a - 1:>+10.1%}")
    for title, values in (("weights", found.weights), ("blocks' outputs", found.outputs)):
        if values:
            worst = sorted(values.items(), key=lambda item: -item[1])[:5]
            mean = sum(values.values()) / len(values)
            lines.append(f"error of {title}: {mean:.4f} on average; the largest:")
            lines += [f"  {error:.4f}  {name}" for name, error in worst]
    return "\n".join(lines)


def drawing(found: Comparison) -> str:
    """The comparison as an SVG picture: bars of what is measured, and errors by layer."""
    one, two = found.sides
    parts: list[str] = []
    panels = [("weights, MB", one.megabytes, two.megabytes)]
    if one.perplexity is not None and two.perplexity is not None:
        panels.append(("perplexity", one.perplexity, two.perplexity))
    if one.tokens_a_second is not None and two.tokens_a_second is not None:
        panels.append(("tokens/s, forward", one.tokens_a_second, two.tokens_a_second))
    for number, (title, a, b) in enumerate(panels):
        parts += _bars(30 + 240 * number, title, (a, b))
    errors = found.outputs or found.weights
    kind = "blocks' outputs" if found.outputs else "weights"
    parts += _errors(f"relative error of {kind}, in order", list(errors.values()))
    legend = (
        f'<text x="30" y="24"><tspan fill="#4878a8">■</tspan> {html.escape(one.name)}   '
        f'<tspan fill="#d08030">■</tspan> {html.escape(two.name)}</text>'
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="760" height="400" '
        'font-family="sans-serif" font-size="13"><rect width="760" height="400" fill="white"/>'
        + legend
        + "".join(parts)
        + "</svg>\n"
    )


def _bars(x: float, title: str, values: tuple[float, float]) -> list[str]:
    top, parts = max(values), [f'<text x="{x}" y="54">{title}</text>']
    for number, value in enumerate(values):
        height = 110 * value / top
        left, color = x + 80 * number, ("#4878a8", "#d08030")[number]
        parts.append(
            f'<rect x="{left}" y="{190 - height:.1f}" width="60" height="{height:.1f}" '
            f'fill="{color}"/><text x="{left}" y="206">{value:,.1f}</text>'
        )
    return parts


def _errors(title: str, values: Sequence[float]) -> list[str]:
    top = max([*values, 1e-12])
    step = 700 / len(values)
    parts = [f'<text x="30" y="240">{html.escape(title)} (up to {top:.3f})</text>']
    for number, value in enumerate(values):
        height = 130 * value / top
        parts.append(
            f'<rect x="{30 + step * number:.1f}" y="{385 - height:.1f}" '
            f'width="{max(step * 0.8, 0.5):.1f}" height="{height:.1f}" fill="#d08030"/>'
        )
    return parts


def _side(folder: Path, model: nn.Module, batches: Sequence[Batch]) -> Side:
    files = [folder] if folder.is_file() else folder.glob("*.safetensors")
    size = sum(file.stat().st_size for file in files) / 1e6
    if not batches:
        return Side(folder.name, size)
    loss, count, began = 0.0, 0, time.perf_counter()
    with torch.inference_mode():
        for batch in batches:
            ids = batch["input_ids"]
            logits: Any = getattr(model(input_ids=ids), "logits", None)
            if logits is None or logits.dim() != 3:
                return Side(folder.name, size)  # no language model
            each = nn.functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
            )
            loss, count = loss + float(each), count + ids[:, 1:].numel()
    speed = sum(b["input_ids"].numel() for b in batches) / (time.perf_counter() - began)
    return Side(folder.name, size, math.exp(loss / count), speed)


def _distances(one: nn.Module, two: nn.Module) -> dict[str, float]:
    others = dict(two.named_modules())
    found = {}
    for name, module in one.named_modules():
        other: Any = others.get(name)
        if not isinstance(module, nn.Linear) or not isinstance(other, nn.Linear):
            continue
        a, b = module.weight.detach().float(), other.weight.detach().float()
        if a.shape == b.shape:
            found[name] = float((a - b).norm() / a.norm().clamp(min=1e-30))
    return found


def _block_distances(one: nn.Module, two: nn.Module, batch: Batch) -> dict[str, float]:
    a, b = (_outputs(model, batch) for model in (one, two))
    return {n: float((a[n] - b[n]).norm() / a[n].norm()) for n in a if n in b}


def _outputs(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def see(module: nn.Module, args: Any, output: Any) -> None:
            found[name] = (output[0] if isinstance(output, tuple) else output).float()

        return see

    hooks = [u.module.register_forward_hook(hook(u.name)) for u in units(model) if u.name]
    try:
        with torch.inference_mode():
            model(**batch)
    finally:
        for each in hooks:
            each.remove()
    return found
