"""What ``drivetrain plan`` prints: tables, or all of it as data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape
from rich.table import Table

from drivetrain_cli.planning.price import flops_of
from drivetrain_cli.tables import show

if TYPE_CHECKING:
    from drivetrain_cli.planning.price import Price
    from drivetrain_cli.planning.rehearsed import Kind, Moment, Rehearsed
    from drivetrain_cli.planning.verdict import Verdict

PHASES = ("build", "forward", "backward", "step")
_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def amount(nbytes: float) -> str:
    """Bytes in words."""
    for unit, name in _UNITS:
        if nbytes >= unit:
            return f"{nbytes / unit:,.2f} {name}"
    return f"{nbytes:,.0f} B"


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds >= 1:
        return f"{seconds:,.2f} s"
    return f"{seconds * 1e3:,.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:,.1f} us"


def headline(verdict: Verdict) -> str:
    """The answer in one sentence."""
    memory = verdict.question.memory
    needs = f"a device needs {amount(verdict.needs)}"
    if verdict.question.ranks.on_cpu:
        needs = f"a rank needs {amount(verdict.needs)} beside what it has before there is a model"
    if memory is None:
        return needs
    fits = "fits" if verdict.fits else "does not fit"
    return f"{fits} into {amount(memory)}: {needs}"


def show_plan(verdict: Verdict) -> None:
    """Print it."""
    found = verdict.heaviest
    question = verdict.question
    click.echo(
        f"{found.parameters:,} parameters ({question.subject.what}) on {question.world} "
        f"rank{'s'[: question.world != 1]}, {found.micro_batch} x {found.accumulation} samples of "
        f"{question.subject.sequence} tokens a rank and step"
    )
    show(values_table(found), memory_table(verdict), traffic_table(found))
    if verdict.price is not None:
        show(time_table(verdict.price))
    click.secho(headline(verdict), fg="green" if verdict.fits else "red")
    for line in advice(verdict):
        click.echo(line)
    for note in verdict.notes:
        click.echo(f"note: {note}")


def advice(verdict: Verdict) -> list[str]:
    """What fits, in words."""
    lines = []
    if verdict.largest is not None:
        samples, needs = verdict.largest
        lines.append(
            f"largest micro-batch that fits: {samples} ({amount(needs)})"
            if samples
            else "no micro-batch fits"
        )
    for change in verdict.ways_out:
        options = " ".join(f"--set {overlay}" for overlay in change.overlays)
        lines.append(f"this would fit: {options} ({amount(change.needs)})")
    if verdict.tried and not verdict.ways_out:
        lines.append("nothing that was tried fits:")
        lines += [f"  {tried}" for tried in verdict.tried]
    return lines


def values_table(found: Rehearsed) -> Table:
    """Every derived value and where it comes from."""
    table = Table("value", "is", "from", title="Values", title_justify="left")
    explained = found.explained
    for rows in (explained.settings, explained.values):
        for name, (value, source) in rows.items():
            table.add_row(name, escape(str(value)), escape(source))
    return table


def kinds_of(moments: Sequence[Moment]) -> list[Kind]:
    """Kinds of memory in all moments, what stays first."""
    sizes: dict[Kind, int] = defaultdict(int)
    for moment in moments:
        for kind, nbytes in moment.held.items():
            sizes[kind] = max(sizes[kind], nbytes)
    return sorted(sizes, key=lambda kind: (_rank(kind), -sizes[kind]))


def _rank(kind: Kind) -> int:
    name = kind[0]
    order = ("parameters", "gradients", "master weights", "optimizer state", "buffers", "gathered")
    return next((at for at, start in enumerate(order) if name.startswith(start)), len(order))


def memory_table(verdict: Verdict) -> Table:
    """Memory by kind where each phase needs most of its device."""
    found = verdict.heaviest
    peaks = {phase: found.peaks[phase] for phase in PHASES if phase in found.peaks}
    title = "Memory of a rank, at the peak of each phase"
    table = Table("kind", "place", *peaks, title=title, title_justify="left")
    for kind in kinds_of(list(peaks.values())):
        cells = (moment.held.get(kind, 0) for moment in peaks.values())
        table.add_row(*kind, *(amount(n) if n else "-" for n in cells))
    table.add_section()
    for place in ("device", "host", "nvme"):
        totals = [moment.total(place) for moment in peaks.values()]
        if any(totals):
            table.add_row("total", place, *(amount(n) for n in totals))
    blank = [""] * (len(peaks) - 1)
    table.add_row("allocator's slack", "device", *blank, amount(found.slack))
    if found.allowance:
        table.add_row("to leave free", "device", *blank, amount(found.allowance))
    return table


def traffic_table(found: Rehearsed) -> Table:
    """Bytes between ranks in one step."""
    columns = ("axis", "ranks", "purpose", "collective", "calls", "sent by a rank")
    table = Table(*columns, title="Bytes of a step", title_justify="left")
    for key, (ranks, calls, _, sent) in traffic(found).items():
        axis, purpose, op = key
        table.add_row(axis, str(ranks), purpose, op, f"{calls:,}", amount(sent))
    return table


def traffic(found: Rehearsed) -> dict[tuple[str, str, str], tuple[int, int, int, float]]:
    """(axis, purpose, collective) -> ranks, calls, payload, bytes that this rank sends."""
    table: dict[tuple[str, str, str], tuple[int, int, int, float]] = {}
    for each in found.sent:
        if not each.calls:
            continue
        key = (each.axis, each.purpose, each.op)
        _, calls, payload, sent = table.get(key, (0, 0, 0, 0.0))
        table[key] = (
            each.ranks,
            calls + each.calls,
            payload + each.payload,
            sent + each.sent,
        )
    return table


def time_rows(price: Price) -> list[tuple[str, float]]:
    """Seconds of a step by what takes them."""
    rows = [(f"computing, {phase}", price.phases.get(phase, 0.0)) for phase in PHASES[1:]]
    rows.append(("Python and dispatch", price.overhead))
    rows.append(("communication that nothing hides", price.exposed))
    if price.bubble:
        rows.append(("waiting for other stages", price.bubble))
    return rows


def time_table(price: Price) -> Table:
    """The time of a step."""
    table = Table("part", "time", title="Time of a step", title_justify="left")
    for label, seconds in time_rows(price):
        table.add_row(label, duration(seconds))
    table.add_section()
    table.add_row("a step", duration(price.seconds))
    table.add_row("of which priced operator by operator", f"{price.exact:.0%}")
    for (axis, purpose), seconds in price.communication.items():
        table.add_row(f"collectives over {axis}, {purpose}", duration(seconds))
    return table


def as_data(verdict: Verdict) -> dict[str, Any]:
    """All of it, for programs; sizes in bytes, times in seconds."""
    found, price, question = verdict.heaviest, verdict.price, verdict.question
    return {
        "fits": verdict.fits,
        "needs": verdict.needs,
        "memory": question.memory,
        "reserved": found.reserved,
        "slack": found.slack,
        "allowance": found.allowance,
        "parameters": found.parameters,
        "world_size": question.world,
        "micro_batch": found.micro_batch,
        "accumulation": found.accumulation,
        "sequence": question.subject.sequence,
        "samples_per_step": found.samples,
        "flops": flops_of(found),
        "values": {
            name: {"value": value, "from": source}
            for rows in (found.explained.settings, found.explained.values)
            for name, (value, source) in rows.items()
        },
        "peaks": {phase: _held(moment) for phase, moment in found.peaks.items()},
        "timeline": [
            {"at": m.at, "phase": m.phase, "window": m.window, "held": _held(m)}
            for m in found.timeline
        ],
        "traffic": [asdict(each) for each in found.sent],
        "time": None if price is None else _time(price),
        "largest_micro_batch": None if verdict.largest is None else verdict.largest[0],
        "ways_out": [{"set": c.overlays, "needs": c.needs} for c in verdict.ways_out],
        "tried": list(verdict.tried),
        "notes": verdict.notes,
    }


def _time(price: Price) -> dict[str, Any]:
    return {
        "seconds": price.seconds,
        **dict(time_rows(price)),
        "flops": price.flops,
        "exact": price.exact,
    }


def _held(moment: Moment) -> list[dict[str, Any]]:
    return [
        {"kind": kind, "place": place, "bytes": nbytes}
        for (kind, place), nbytes in moment.held.items()
    ]
