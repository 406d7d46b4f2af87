"""A run's ledger as a table."""

from __future__ import annotations

from collections.abc import Iterator

from drivetrain_profiler.ledger.summary import Summary, in_order

_SHOWN_RANKS = 8

_MEANINGS = {
    "offload": "waiting for the host or for files that states are in",
    "data": "waiting for micro-batches",
    "start": "until the first micro-batch of the first attempt",
    "restart": "from the end of an attempt to the first micro-batch of the next",
    "done again": "steps that a later attempt had to make once more",
    "idle": "outside of the engine: the script itself, monitors, the end",
}


def table(found: Summary) -> str:
    """The whole run: columns of all ranks together and of each, and what follows from them."""
    return "\n".join([*_head(found), "", *_columns(found), "", *_facts(found)]) + "\n"


def _head(found: Summary) -> Iterator[str]:
    times = "once" if found.attempts == 1 else f"{found.attempts} times"
    killed = f", {found.killed} of them ended without closing" if found.killed else ""
    yield (
        f"{found.wall:.2f} s on {len(found.ranks)} ranks, started {times}{killed}; "
        f"{found.steps} steps"
        + (f", and {found.redone} that were made again" if found.redone else "")
    )
    yield f"goodput {found.goodput:.1%}"


def _columns(found: Summary) -> Iterator[str]:
    shown = dict(list(found.ranks.items())[:_SHOWN_RANKS])
    ranks = "".join(f"{f'rank {rank}':>11}" for rank in shown)
    yield f"{'column':36}{'seconds':>11}{'share':>8}{ranks}"
    for column in in_order(found.columns):
        seconds = found.columns[column]
        own = "".join(f"{of.get(column, 0.0):>11.3f}" for of in shown.values())
        yield f"{column:36}{seconds:>11.3f}{_share(seconds, found.wall):>8}{own}"
    total = sum(found.columns.values())
    own = "".join(f"{sum(of.values()):>11.3f}" for of in shown.values())
    yield f"{'all columns':36}{total:>11.3f}{_share(total, found.wall):>8}{own}"
    if len(found.ranks) > _SHOWN_RANKS:
        yield f"({len(found.ranks) - _SHOWN_RANKS} more ranks: --json has them)"


def _facts(found: Summary) -> Iterator[str]:
    for column in found.columns:
        if column in _MEANINGS:
            yield f"{column}: {_MEANINGS[column]}"
    for column, seconds in found.waiting.items():
        yield f"{column}: {seconds:.3f} s of it a rank waited until the others were ready"
    for one in found.stragglers:
        if one.seconds > 0.01 * found.wall:
            yield (
                f"rank {one.rank} kept the others waiting for {one.seconds:.3f} s in {one.steps} "
                f"steps; more than theirs was its {one.column}"
            )
    for name, nbytes in found.sent.items():
        yield f"sent {name}: {nbytes / 2**20:.1f} MiB per rank"
    memory = f"memory of a process at most {found.host_bytes / 2**20:.0f} MiB"
    if found.device_bytes:
        memory += f", tensors of a device at most {found.device_bytes / 2**20:.0f} MiB"
    yield memory


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else ""
