"""The profile as text: figures of the whole, the largest modules, and the model with figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from drivetrain_profiler.measured import ModuleFigures

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def scaled(value: float, unit: str = "", digits: int = 2) -> str:
    """A number with a prefix, e.g. ``"1.50 GMACs"``."""
    for size, prefix in _PREFIXES:
        if abs(value) >= size:
            return f"{value / size:.{digits}f} {prefix}{unit}"
    return f"{value:.{digits}f} {unit}".rstrip() if value % 1 else f"{value:.0f} {unit}".rstrip()


def duration(seconds: float) -> str:
    """A time, e.g. ``"1.50 ms"``."""
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds / 1e-6:.2f} us"


@dataclass
class Summary:
    """What the head of a report says beside the figures of the model.

    Args:
        title: its first line.
        facts: further lines: label -> value.
        unknown: operators that could not be counted -> calls.
    """

    title: str
    facts: Mapping[str, str] = field(default_factory=dict)
    unknown: Mapping[str, int] = field(default_factory=dict)


def profile_text(
    model: ModuleFigures,
    summary: Summary,
    *,
    depth: int = -1,
    top: int = 1,
    detailed: bool = True,
) -> str:
    """The report.

    Args:
        model: figures of the whole.
        summary: what else stands at its head.
        depth: down to which depth modules are listed; -1 for the deepest.
        top: how many of each depth are listed.
        detailed: whether the model with figures follows.
    """
    deepest = max(row.depth for row in model.walk())
    last = deepest if depth < 0 else min(depth, deepest)
    lines = [summary.title, *_head(model, summary), "", f"largest {top} of each depth, forward:"]
    for number in range(last + 1):
        lines += _largest([row for row in model.walk() if row.depth == number], number, top)
    if detailed:
        lines += ["", "modules, each with all that is inside of it, and its share of the whole:"]
        lines += [_row(row, model) for row in model.walk() if row.depth <= last]
    return "\n".join(lines) + "\n"


def _head(model: ModuleFigures, summary: Summary) -> list[str]:
    facts = {
        "parameters of this rank": scaled(model.parameters),
        "forward": f"{scaled(model.forward.flops, 'FLOPs')}, {scaled(model.forward.macs, 'MACs')}",
    }
    if model.seconds:
        speed = scaled(model.forward.flops / model.seconds, "FLOPS")
        facts["forward time"] = f"{duration(model.seconds)}, {speed}"
    if model.backward.flops:
        facts["backward"] = scaled(model.backward.flops, "FLOPs")
    if model.recompute.flops:
        facts["computed again in backward"] = scaled(model.recompute.flops, "FLOPs")
    facts |= summary.facts
    width = max(map(len, facts)) + 2
    lines = [f"  {label:{width}}{value}" for label, value in facts.items()]
    if summary.unknown:
        calls = ", ".join(f"{name} ({n} calls)" for name, n in sorted(summary.unknown.items()))
        lines.append(f"  not counted, see register_formula: {calls}")
    return lines


def _largest(rows: list[ModuleFigures], depth: int, top: int) -> list[str]:
    """Classes of modules at one depth, the largest first, by three measures."""
    kinds: dict[str, list[float]] = {}
    for row in rows:
        sums = kinds.setdefault(row.kind, [0.0, 0.0, 0.0])
        for place, value in enumerate((row.parameters, row.forward.macs, row.seconds)):
            sums[place] += value
    lines = [f"  depth {depth}:"]
    measures: list[tuple[str, Callable[[float], str]]] = [
        ("params", scaled),
        ("MACs", scaled),
        ("time", duration),
    ]
    for place, (label, show) in enumerate(measures):
        ordered = sorted(kinds.items(), key=lambda item: -item[1][place])[:top]
        named = ", ".join(f"{kind} {show(values[place])}" for kind, values in ordered)
        lines.append(f"    {label:8}{named}")
    return lines


def _row(row: ModuleFigures, model: ModuleFigures) -> str:
    parts = [
        f"{scaled(row.parameters)} params{_share(row.parameters, model.parameters)}",
        f"{scaled(row.forward.macs)} MACs{_share(row.forward.macs, model.forward.macs)}",
        f"{scaled(row.forward.flops)} FLOPs{_share(row.forward.flops, model.forward.flops)}",
    ]
    if row.seconds:
        parts.append(f"{duration(row.seconds)}{_share(row.seconds, model.seconds)}")
        parts.append(scaled(row.forward.flops / row.seconds, "FLOPS"))
    if row.backward.flops:
        parts.append(f"backward {scaled(row.backward.flops)} FLOPs")
    if row.recompute.flops:
        parts.append(f"again {scaled(row.recompute.flops)} FLOPs")
    name = f"({row.label}): {row.kind}" if row.name else row.kind
    return f"{'  ' * (row.depth + 1)}{name}  {', '.join(parts)}"


def _share(part: float, whole: float) -> str:
    return f" ({100 * part / whole:.1f} %)" if whole else ""
