"""What ``drivetrain report --memory`` prints: needs beside what there is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from drivetrain_cli.machine import Machine
    from drivetrain_cli.memory import Forecast, Ranks

COLUMNS = ("device", "host", "pinned", "nvme")
_LABELS = {"parameter": "parameters", "gradient": "gradients", "master": "master weights"}
_GIB, _MIB = 1 << 30, 1 << 20


def folders_in(config: Any) -> Iterator[str]:
    """Every ``nvme_path`` of a config."""
    for key, value in config.items() if isinstance(config, Mapping) else ():
        if key == "nvme_path" and isinstance(value, str):
            yield value
        yield from folders_in(value)


def machine_table(machine: Machine) -> Table:
    """What this machine has."""
    table = Table(title="this machine has", title_justify="left", show_header=False)
    devices = f"{machine.devices} x " if machine.devices != 1 else ""
    rows = {
        "device": devices + _amount(machine.device, "unknown"),
        "host, available": _amount(machine.host, "unknown"),
        "a process may lock": _amount(machine.pinned, "any amount"),
        f"free at {machine.folder}": _amount(machine.nvme, "unknown"),
    }
    for label, value in rows.items():
        table.add_row(escape(label), value)
    return table


def forecast_table(forecast: Forecast, ranks: Ranks, machine: Machine) -> Table:
    """Needs of one rank by kind, all of them, and what there is for them."""
    kinds = forecast.by_kind()
    totals = total_of(forecast)
    unit, name = (_GIB, "GiB") if max(totals.values()) >= _GIB else (_MIB, "MiB")
    table = Table(f"one rank, {name}", "each device", *COLUMNS[1:])
    states = {kind for kind, *_ in forecast.held}
    for kind, places in kinds.items():
        usual = f"optimizer state {kind}" if kind in states else kind
        table.add_row(escape(_LABELS.get(kind, usual)), *_cells(places, unit))
    table.add_section()
    table.add_row("total", *_cells(totals, unit))
    wanted = needs(totals, ranks, machine.devices)
    if wanted != totals:
        table.add_row(f"{ranks.per_machine} ranks of a machine", *_cells(wanted, unit))
    table.add_row("this machine has", *_cells(_offers(machine), unit))
    return table


def total_of(forecast: Forecast) -> dict[str, int]:
    """Bytes by place of all kinds."""
    kinds = forecast.by_kind().values()
    return {column: sum(places[column] for places in kinds) for column in COLUMNS}


def needs(totals: Mapping[str, int], ranks: Ranks, devices: int) -> dict[str, int]:
    """What all ranks of one machine need together, and of each device those that share it."""
    sharing = ranks.per_machine
    if not ranks.on_cpu:
        sharing = -(-ranks.per_machine // devices) if devices else 1
    count = {**dict.fromkeys(COLUMNS, ranks.per_machine), "device": sharing}
    return {column: count[column] * totals[column] for column in COLUMNS}


def shortages(forecast: Forecast, ranks: Ranks, machine: Machine) -> Sequence[str]:
    """What this machine has too little of, one sentence each."""
    totals = total_of(forecast)
    wanted = needs(totals, ranks, machine.devices)
    if ranks.on_cpu:
        wanted["host"] += wanted.pop("device")
    offered = _offers(machine)
    found = [
        f"{place}: {_amount(nbytes, '')} are needed, but there are {_amount(offered[place], '')}"
        for place, nbytes in wanted.items()
        if place != "pinned" and (there := offered[place]) is not None and nbytes > there
    ]
    if machine.pinned is not None and totals["pinned"] > machine.pinned:
        found.append(
            f"pinned: a rank locks {_amount(totals['pinned'], '')}, but a process may lock "
            f"{_amount(machine.pinned, '')} (ulimit -l), which some drivers do not ask for"
        )
    return found


def _offers(machine: Machine) -> dict[str, int | None]:
    return {
        "device": machine.device,
        "host": machine.host,
        "pinned": machine.pinned,
        "nvme": machine.nvme,
    }


def _cells(places: Mapping[str, int | None], unit: int) -> list[str]:
    values = [places[column] for column in COLUMNS]
    return ["-" if value in (None, 0) else f"{value / unit:,.2f}" for value in values]


def _amount(nbytes: int | None, otherwise: str) -> str:
    if nbytes is None:
        return otherwise
    unit, name = (_GIB, "GiB") if nbytes >= _GIB else (_MIB, "MiB")
    return f"{nbytes / unit:,.2f} {name}"
