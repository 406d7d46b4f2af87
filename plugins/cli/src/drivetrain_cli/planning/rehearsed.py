"""Two windows of a job, rehearsed: what they hold when, compute, and send."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from drivetrain.errors import DrivetrainError
from drivetrain_cli.memory import held_rows
from drivetrain_cli.planning.allocators import caching_peak, heap_allowance, heap_peak
from drivetrain_cli.planning.fused_attention import fused_attention
from drivetrain_cli.planning.walk import Walk, walking
from drivetrain_cli.rehearsal import rehearsal

if TYPE_CHECKING:
    from drivetrain.engine.engine import Engine
    from drivetrain.plan.plan import Explanation
    from drivetrain_cli.memory import Ranks
    from drivetrain_cli.planning.operators import Operators
    from drivetrain_cli.planning.subject import Subject
    from drivetrain_cli.rehearsed_messages import Passed, Post

Kind = tuple[str, str]
"""What it is, and where: ``"device"``, ``"host"`` or ``"nvme"``."""

FIRST, REPEATED, LAST = 1, 2, 3
"""Parts of the way: a window that allocates what stays; a micro-batch of the second window that is
not its last, and the last one with the update."""

_TORN = 0.1
"""Share of a stage's heap that is left free beside: micro-batches whose lives overlap leave holes
in it, more than the heap that is played back has (up to 0.1 of it was measured)."""

STATES = {"parameter": "parameters", "gradient": "gradients", "master": "master weights"}


class Moment(NamedTuple):
    """Bytes at one point of the way, where they are most in its neighbourhood.

    Args:
        at: operators that have run.
        phase: where.
        window: part of the way.
        held: kind -> bytes.
    """

    at: int
    phase: str
    window: int
    held: Mapping[Kind, int]

    def total(self, place: str) -> int:
        """Bytes in one place."""
        return sum(nbytes for (_, where), nbytes in self.held.items() if where == place)


@dataclass
class Sent:
    """Collectives of one window that are counted together.

    Args:
        purpose: what for.
        axis: between whom.
        op: kind of collective.
        ranks: how many take part.
        calls: how often.
        payload: bytes of the tensors that they are about.
        sent: bytes that this rank sends.
    """

    purpose: str
    axis: str
    op: str
    ranks: int
    calls: int
    payload: int
    sent: float


@dataclass
class Rehearsed:
    """What one rank does.

    Args:
        rank: which.
        micro_batch: samples of a micro-batch.
        accumulation: micro-batches of a window.
        stages: of a pipeline.
        peaks: phase -> moment at which the device holds most.
        timeline: moments in order.
        sent: collectives of one window, as if all micro-batches had run.
        operators: what ran.
        samples: of all ranks in one step.
        parameters: number of them in the whole model.
        explained: what the plan decides, and why.
        on_cpu: whether the device's memory is the host's.
        pinned: bytes of the host that are page-locked.
        reserved: most bytes of the device that the allocator holds; of a CPU's process, the
            resident set beside what it has before there is a model.
        allowance: bytes to leave free beside them, for what differs from run to run.
        notes: what was assumed.
        step_begins: operators that have run before the last window.
        passed: messages between stages in that window, in the order in which they leave or are
            waited for.
    """

    rank: int
    micro_batch: int
    accumulation: int
    stages: int
    peaks: dict[str, Moment]
    timeline: list[Moment]
    sent: list[Sent]
    operators: Operators
    samples: int
    parameters: int
    explained: Explanation
    on_cpu: bool = False
    pinned: int = 0
    reserved: int = 0
    allowance: int = 0
    notes: list[str] = field(default_factory=list)
    step_begins: int = 0
    passed: Sequence[Passed] = ()

    @property
    def needs(self) -> int:
        """Bytes that the device has to have, so that the job does not run out."""
        return self.reserved + self.allowance

    @property
    def slack(self) -> int:
        """Bytes that the allocator holds without use."""
        return self.reserved - self.in_use

    @property
    def in_use(self) -> int:
        """Most bytes in use at once in the memory that the device's allocator serves."""
        if self.on_cpu:
            return max(m.total("device") + m.total("host") for m in self.peaks.values())
        return self.peak()

    def peak(self, place: str = "device") -> int:
        """Most bytes in one place, over all phases."""
        return max(moment.total(place) for moment in self.peaks.values())


def rehearse(
    config: Mapping[str, Any],
    subject: Subject,
    ranks: Ranks,
    *,
    overlays: Sequence[str] = (),
    rank: int = 0,
    world: int | None = None,
    post: Post | None = None,
) -> Rehearsed:
    """Run two windows of one rank.

    Args:
        config: as a job gets it.
        subject: makes the model, and its inputs.
        ranks: how many, and where.
        overlays: on top of the config.
        rank: which one.
        world: number of ranks, where it is not a multiple of those of a machine.
        post: carries what rehearsed ranks tell each other.

    Raises:
        ConfigError: the config is not one that a job would run, or the model cannot be made.
        DrivetrainError: it does not run without memory; says what stopped it.
    """
    module = subject.make()
    parameters = sum(p.numel() for p in module.parameters())
    with (
        walking() as walk,
        fused_attention(ranks.on_cpu),
        rehearsal(
            config,
            module,
            ranks=world or ranks.per_machine * ranks.machines,
            ranks_on_host=ranks.per_machine,
            on_cpu=ranks.on_cpu,
            overlays=overlays,
            rank=rank,
            batch_required=True,
            counter=walk,
            post=post,
        ) as engine,
    ):
        sent = _windows(engine, subject, walk)
        _name_states(engine, walk)
        found = _found(engine, walk, sent, parameters)
        found.on_cpu, found.notes = ranks.on_cpu, list(subject.notes)
        found.step_begins = walk.begun.get(LAST, 0)
        passed = post.passed[rank] if post is not None and found.stages > 1 else ()
        found.passed = [each for each in passed if each.moment >= found.step_begins]
    return _with_allocator(found, walk)


def _found(engine: Engine, walk: Walk, sent: list[Sent], parameters: int) -> Rehearsed:
    """What an engine has done, without what an allocator adds."""
    elsewhere, pinned = _elsewhere(engine)
    moments, peaks = _replay(walk, elsewhere)
    plan = engine.job.plan
    assert plan.batch is not None
    return Rehearsed(
        rank=engine.job.rank,
        micro_batch=plan.batch.micro_batch_size,
        accumulation=plan.batch.accumulation_steps,
        stages=engine.job.mesh.size("pp"),
        peaks=peaks,
        timeline=moments,
        sent=sent,
        operators=walk.operators,
        samples=plan.batch.train_batch_size,
        parameters=parameters,
        explained=plan.explain(),
        pinned=pinned,
    )


def _windows(engine: Engine, subject: Subject, walk: Walk) -> list[Sent]:
    """Run two windows; return what the second one sends."""
    engine.train()
    log, steps = engine.job.byte_log, engine.gradient_accumulation_steps()
    with _phases(engine, walk), _explained(engine):
        if engine.job.mesh.size("pp") > 1:
            for part in (FIRST, LAST):
                walk.begin(part)
                log.reset()
                samples = engine.train_micro_batch_size_per_gpu()
                batches = [_as_batch(subject.batch(engine.module, samples)) for _ in range(steps)]
                engine.train_batch(iter(batches))
                _name_states(engine, walk)
            return _sent(engine, 1)
        for part, last in ((FIRST, steps == 1), (FIRST, True)):
            _micro_batch(engine, subject, walk, part, last)
        _name_states(engine, walk)
        log.reset()
        if steps > 1:
            _micro_batch(engine, subject, walk, REPEATED, last=False)
        repeated = _sent(engine, steps - 1)
        log.reset()
        _micro_batch(engine, subject, walk, LAST, last=True)
        return repeated + _sent(engine, 1)


def _micro_batch(engine: Engine, subject: Subject, walk: Walk, part: int, last: bool) -> None:
    walk.begin(part)
    engine.set_gradient_accumulation_boundary(last)
    args, kwargs = subject.batch(engine.module, engine.train_micro_batch_size_per_gpu())
    loss = subject.loss(engine(*args, **kwargs))
    walk.outer = "backward"
    engine.backward(loss)
    del loss, args, kwargs
    engine.step()


def _as_batch(call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    args, kwargs = call
    return kwargs or args


@contextmanager
def _phases(engine: Engine, walk: Walk) -> Iterator[None]:
    """Tell the walk when an update begins and ends."""
    job, span = engine.job, engine.job.span

    @contextmanager
    def walked(name: str) -> Iterator[None]:
        before = walk.outer
        if name == "step":
            walk.outer = "step"
        try:
            with span(name):
                yield
        finally:
            if name == "step":
                walk.outer = before

    job.span = walked  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del job.span


@contextmanager
def _explained(engine: Engine) -> Iterator[None]:
    try:
        yield
    except DrivetrainError:
        raise
    except Exception as error:
        raise DrivetrainError(
            f"a step of {type(engine.module).__name__} does not run without memory: "
            f"{type(error).__name__}: {error}; what needs values of tensors, or kernels that give "
            "no shapes for the device meta, cannot be planned (drivetrain report --memory counts "
            "states all the same)"
        ) from error


def _name_states(engine: Engine, walk: Walk) -> None:
    """Tell the walk which memory is parameters, gradients and states, where it is the device's."""
    for fragment in engine.states.fragments():
        if fragment.home != "nvme" and fragment.kind != "step":
            piece = walk.piece_of(fragment.read().untyped_storage())
            if piece is not None and walk.kinds.get(piece, ("", ""))[0] not in STATES.values():
                kind = STATES.get(fragment.kind, f"optimizer state {fragment.kind}")
                walk.kinds[piece] = (kind, fragment.home)
    for parameter in engine.module.parameters():
        piece = walk.piece_of(parameter.data.untyped_storage())
        if piece is not None:
            walk.kinds.setdefault(piece, (STATES["parameter"], "device"))


def _elsewhere(engine: Engine) -> tuple[dict[Kind, int], int]:
    """What plugins say is in files, and on the host beside states; and how much is page-locked."""
    found: Counter[Kind] = Counter()
    pinned = 0
    for kind, place, nbytes, _ in held_rows(engine):
        if place == "nvme":
            found[STATES.get(kind, f"optimizer state {kind}"), place] += nbytes
    for kind, place, nbytes, locked in engine.job.hub.memory_rows(engine, 0, 1):
        pinned += locked
        if place != "device" and nbytes > 0:
            found[kind, place] += nbytes
    return dict(found), pinned


def _replay(walk: Walk, elsewhere: Mapping[Kind, int]) -> tuple[list[Moment], dict[str, Moment]]:
    """The way as moments, some hundred of them, and the largest of each phase."""
    last = max(1, walk.operators.moment)
    bins: dict[int, Moment] = {}
    peaks: dict[str, Moment] = {}
    held: dict[Kind, int] = defaultdict(int)
    totals: dict[str, int] = defaultdict(int)
    born: dict[int, str] = {}
    host = sum(nbytes for (_, place), nbytes in elsewhere.items() if place == "host")
    begin = next((c.moment for c in walk.changes if c.window), 0)
    for change in walk.changes:
        kind = walk.kind_of(change, born)
        held[kind] += change.nbytes
        totals[kind[1]] += change.nbytes
        most = totals["device"]
        bin_ = (change.moment - begin) * 400 // (last - begin + 1) if change.window else -1
        first = change.phase not in peaks or most > peaks[change.phase].total("device")
        higher = bin_ not in bins or most > bins[bin_].total("device")
        if first or higher:
            moment = Moment(change.moment, change.phase, change.window, dict(held))
            peaks |= {change.phase: moment} if first else {}
            bins |= {bin_: moment} if higher else {}
    moments = [bins[key] for key in sorted(bins)]
    fixed = {phase: _with(moment, elsewhere, host) for phase, moment in peaks.items()}
    return [_with(moment, elsewhere, host) for moment in moments], fixed


def _with_allocator(found: Rehearsed, walk: Walk) -> Rehearsed:
    """With what the device's allocator holds, and what is to be left free."""
    found.reserved = _reserved(walk, found)
    found.allowance = heap_allowance(found.reserved) if found.on_cpu else 0
    if found.on_cpu and found.stages > 1:
        found.allowance += int(_TORN * found.reserved)
    return found


def _reserved(walk: Walk, found: Rehearsed) -> int:
    """Most bytes that the device's allocator holds."""
    if found.on_cpu:
        requests = ((change.piece, change.nbytes) for change in walk.changes)
        played = heap_peak(requests, walk.shared, walk.threads)
        unseen = found.in_use - walk.most()  # what plugins say that they hold beside tensors
        return played + max(0, unseen)
    there = (c for c in walk.changes if walk.kinds.get(c.piece, ("", "device"))[1] == "device")
    return max(found.in_use, caching_peak((c.piece, c.nbytes) for c in there))


def _with(moment: Moment, elsewhere: Mapping[Kind, int], host: int) -> Moment:
    """With what is elsewhere, which was made beside other buffers of the rehearsal's one device."""
    held = {kind: nbytes for kind, nbytes in moment.held.items() if nbytes}
    buffers = held.get(("buffers", "device"), 0)
    held["buffers", "device"] = max(0, buffers - host)
    for kind, nbytes in elsewhere.items():
        held[kind] = held.get(kind, 0) + nbytes
    return moment._replace(held={kind: nbytes for kind, nbytes in held.items() if nbytes})


def _sent(engine: Engine, times: int) -> list[Sent]:
    """What the log counts, ``times`` over."""
    found = []
    for call, traffic in engine.job.byte_log.items():
        axis = " x ".join(call.axis) if isinstance(call.axis, tuple) else str(call.axis)
        size = engine.job.mesh.size(call.axis)
        calls, payload = times * traffic.calls, times * traffic.payload_bytes
        sent = times * traffic.sent_bytes
        found.append(Sent(call.purpose.value, axis, str(call.op), size, calls, payload, sent))
    return found
