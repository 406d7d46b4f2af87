"""Parameters in one flat buffer, of which every rank keeps a shard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from drivetrain.contracts import (
    BucketSpec,
    Fragment,
    Handle,
    ParameterHome,
    Purpose,
    StateHome,
    Tag,
)
from drivetrain.errors import TrainingError
from drivetrain.states.buckets import is_first_copy
from drivetrain.states.device_home import segment_fragment
from drivetrain.states.loose import broadcast_first
from drivetrain.states.whole import handed_over, shows_client_tensor
from drivetrain_zero.shards.foreign_changes import ForeignChanges
from drivetrain_zero.shards.packing import Packing, pack
from drivetrain_zero.shards.secondary import SecondaryShard
from drivetrain_zero.shards.whole_memory import WholeMemory

if TYPE_CHECKING:
    from drivetrain.contracts import Axis
    from drivetrain.job.job import Job
    from drivetrain.states.buckets import PlannedBucket


class ShardedBucket:
    """The parameters of one bucket: whole while they are *gathered*, else only this rank's shard.

    At stages 1 and 2 they are always gathered and the shard is a slice of the whole. Where they are
    *sharded*, the whole is memory that comes and goes while its storage object stays: tensors that
    autograd has saved are views of that storage, and hold the right values again once it is
    gathered for backward. A parameter that is not gathered keeps its shape and reads as NaN.

    Ranks that share memory need no copy to compute: the whole is there, as one row of all shards,
    and gathering is only a matter of showing it. Whoever may write gets a copy (``private``).

    A :class:`~drivetrain.contracts.ParameterHome` keeps the shard itself. It is then fetched to its
    place in the whole and gathered there; a single rank releases its parameters too.

    Args:
        job: memory, collectives, facts about parameters.
        plan: the parameters and what they have in common.
        axis: ranks that shard the bucket between them; its reduction, or the inner part of it.
        replica_axis: the rest of its reduction, over which shards are copies; ``None`` for none.
        sharded: whether parameters are released between uses.
        kept: whether they stay gathered all the same, from their first use to the next update.
        rounds: whether the communicator rounds what it gathers of them (qwZ). The shard is then
            memory of its own and stays exact, also where parameters are always gathered.
    """

    def __init__(
        self,
        job: Job,
        plan: PlannedBucket,
        axis: Axis,
        replica_axis: Axis | None,
        *,
        sharded: bool,
        kept: bool = False,
        rounds: bool = False,
    ) -> None:
        self._job = job
        communicator = job.communicator
        self.key = plan.spec.key
        self.plan = plan
        self.parameters = plan.parameters
        self._shapes = [parameter.shape for parameter in plan.parameters]
        self.axis = axis
        self.replica_axis = replica_axis
        self.ranks = communicator.size(axis)
        self.sharded = sharded and self.ranks > 1
        self.rounds = rounds and self.ranks > 1
        self._secondary: SecondaryShard | None = None
        grain = "element" if plan.spec.rule is None else plan.spec.rule.grain
        page = communicator.joined_page(axis) if self.sharded and not self.rounds else 0
        self.packing = pack(
            [p.numel() for p in plan.parameters],
            self.ranks,
            grain,
            page // plan.spec.parameter_dtype.itemsize,
        )
        self.rank = communicator.rank(axis)
        # Of the ranks that hold the same shard, the first counts in norms and checkpoints.
        first_copy = communicator.rank(plan.spec.reduction) == self.rank
        self.counts = first_copy and is_first_copy(communicator, plan.spec.replicated)
        spec = _shard_spec(plan.spec, self.packing, self.rank, owner=self.counts)
        self.spec = replace(spec, released=sharded and not kept)
        self.home: StateHome
        self._keeper: ParameterHome | None = None
        self.shown: Callable[[bool], None] | None = None
        """Told whenever the parameters become whole or are released."""
        self.watch: ForeignChanges | None = None
        """Finds changes of what the parameters show that did not come from here."""
        self._shown: Sequence[torch.Tensor] = ()
        self._versions: list[int] = []
        self._checks = self._is_known = False
        self._handle: Handle | None = None
        self._copied = self._exact = self._fetching = self._changed = False
        self.gathered = not self.sharded

    def _make_memory(self) -> None:
        """Allocate the whole and the shard; not before the client's values can take their place."""
        self._row = self._joined()
        self.whole, self.shard = self._allocate()
        self._views = self.views_of(self.whole)
        self._row_views = [] if self._row is None else self.views_of(self._row)
        self._absent = [_absent(view) for view in self._views]
        if self.sharded:
            self._free()

    def _joined(self) -> torch.Tensor | None:
        """All shards as they lie in memory that the ranks share, if they do."""
        dtype, device, packing = self.spec.parameter_dtype, self.spec.device, self.packing
        communicator = self._job.communicator
        page = communicator.joined_page(self.axis) if device.type == "cpu" else 0
        apart = not self.sharded or self.rounds or self._keeper is not None
        if apart or not page or packing.shard * dtype.itemsize % page:
            return None
        return communicator.joined_buffer(packing.shard, dtype, self.axis)

    def _allocate(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole and the shard."""
        dtype, device, packing = self.spec.parameter_dtype, self.spec.device, self.packing
        if self.sharded or device.type == "meta":
            self._memory = WholeMemory(packing.numel, dtype, device, self._keeper)
            whole = self._memory.tensor
        else:
            whole = self._job.communicator.buffer(packing.numel, dtype, self.axis)
        if self._keeper is not None or (not self.sharded and not self.rounds):
            return whole, self.shard_of(whole)
        if self._row is not None:
            return whole, self.shard_of(self._row)
        if device.type == "meta":
            return whole, torch.empty(packing.shard, dtype=dtype, device=device)
        return whole, self._job.communicator.buffer(packing.shard, dtype, self.axis)

    def views_of(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Every parameter's place in a flat tensor of this layout, in the parameter's shape."""
        packing = self.packing
        return [
            flat.narrow(0, offset, numel).view(shape)
            for shape, offset, numel in zip(
                self._shapes, packing.offsets, packing.numels, strict=True
            )
        ]

    def place_of(self, index: int) -> torch.Tensor | None:
        """What parameter ``index`` shows, if it shows the same all the time."""
        return None if self.sharded else self._views[index]

    def shard_of(self, flat: torch.Tensor) -> torch.Tensor:
        """This rank's slice of a flat tensor of this layout."""
        return flat.narrow(0, self.rank * self.packing.shard, self.packing.shard)

    # -- set-up -------------------------------------------------------------------------------

    def adopt(self, home: StateHome) -> None:
        """Take the parameters' values, the first rank's on all, and hand the shard to ``home``.

        Collective. Parameters that are sharded already (``zero.Init``) are gathered meanwhile.
        """
        self.home = home
        if isinstance(home, ParameterHome):
            self._keeper, self.sharded, self.gathered = home, True, False
        self._make_memory()
        wide = max((p.dtype for p in self.parameters), key=lambda dtype: dtype.itemsize)
        with handed_over(self.parameters):
            originals = torch.zeros(self.packing.numel, dtype=wide, device=self.spec.device)
            for view, parameter in zip(self.views_of(originals), self.parameters, strict=True):
                view.copy_(parameter.detach())
        axes = self.spec.reduction, self.spec.replicated
        broadcast_first(self._job, originals, self.key, *axes)
        mine = self.shard_of(originals)
        if self._keeper is not None:
            self._memory.take()
        if self.sharded or self.rounds:
            self.shard.copy_(mine)
        if self.sharded:
            self._show(self._absent)
        else:
            self.whole.copy_(originals)
            self._show(self._views)
        for parameter in self.parameters:
            parameter.grad = None
        home.step = self.plan.step
        home.adopt(self.shard, mine)
        if self._keeper is not None:
            self._free()
        if self.rounds:
            self.publish()
            self.finish_publish()

    def keep_secondary(self, axis: Axis) -> None:
        """From now on, gather from a second shard over ``axis`` where that is up to date (hpZ)."""
        if self._row is None:
            communicator, numel = self._job.communicator, self.packing.numel
            self._secondary = SecondaryShard(communicator, axis, numel, self.spec)

    # -- the whole, for a while ---------------------------------------------------------------

    @property
    def fetches(self) -> bool:
        """Whether the shard comes from elsewhere before it is gathered."""
        return self._keeper is not None

    def fetch_ahead(self) -> None:
        """Begin to bring this rank's shard to where it is gathered from. Not collective."""
        if self._keeper is None or self._copied or self._handle is not None or self._fetching:
            return
        if self._secondary is None or not self._secondary.valid:
            self._memory.take()
            self._keeper.fetch(self.shard)
            self._fetching = True

    def _finish_fetch(self) -> None:
        if self._fetching:
            assert self._keeper is not None
            self._keeper.fetched()
            self._fetching = False

    def start_gather(self, *, asynchronous: bool, again: bool = False) -> None:
        """Begin to make the parameters whole, for reading. Collective.

        Args:
            asynchronous: go on meanwhile.
            again: also where they are whole already, to take part in what others need.
        """
        if self._row is None:
            self._start_copy(asynchronous=asynchronous)
        if again and self._copied and self._handle is None:
            self._handle = self._gather("gather", asynchronous=asynchronous)

    def finish_gather(self) -> None:
        """Return once the parameters are whole."""
        if self._row is not None and not self.gathered:
            self._show(self._row_views)
            self.gathered = True
        self._finish_copy()

    def gather_private(self) -> None:
        """Make the parameters whole in memory of this rank's own, unrounded. Collective."""
        if self.sharded:
            self._memory.is_lent = True
        self._start_copy(asynchronous=False)
        self._finish_copy()
        if self.rounds and not self._exact:
            if self._keeper is not None:
                self._keeper.fetch(self.shard)  # its place holds what was gathered, rounded
                self._keeper.fetched()
            tag = Tag(Purpose.STATE, self.key, "exact")
            self._job.communicator.all_gather(self.whole, self.shard, self.axis, tag)
            self._exact = True
            self._note()

    def release(self) -> None:
        """Give the whole up again; the shard stays. Collective where it was shown unrounded."""
        exact, self._exact = self._exact, False
        if not self.sharded:
            if exact:
                self._gather("publish", asynchronous=False)
                self._note()
            return
        self._finish_copy()
        if self._changed:
            assert self._keeper is not None
            self._keeper.keep(self.shard)
            self._changed = False
        if self.gathered:
            self._show(self._absent)
            self._free()
            self.gathered = self._copied = False
        elif self._fetching:
            self._finish_fetch()
            self._free()

    def _free(self) -> None:
        """Give back the memory of the whole."""
        if self._memory.leave_to_clients():
            self.whole = self._memory.tensor
            self._views = self.views_of(self.whole)
            if self._keeper is not None:
                self.shard = self.shard_of(self.whole)
        self._memory.give_back()

    def _start_copy(self, *, asynchronous: bool) -> None:
        if not self.sharded or self._copied or self._handle is not None:
            return
        self.fetch_ahead()
        self._finish_fetch()
        self._memory.take()
        self._handle = self._gather("gather", asynchronous=asynchronous)

    def _finish_copy(self) -> None:
        if self.sharded and self._handle is not None:
            self._handle.wait()
            self._handle = None
            if self._secondary is not None and not self._secondary.valid:
                self._secondary.keep(self.whole)
            self._show(self._views)
            self.gathered = self._copied = True

    def publish(self) -> None:
        """After an update, begin to show all shards to every rank, where parameters stay whole."""
        self.forget_secondary()
        if not self.sharded and self.ranks > 1:
            self._handle = self._gather("publish", asynchronous=True)

    def finish_publish(self) -> None:
        """Return once every rank has what was published."""
        if not self.sharded and self._handle is not None:
            self._handle.wait()
            self._handle = None

    def forget_secondary(self) -> None:
        """The shard has changed: the next gather is made from it."""
        if self._keeper is not None and self._fetching:
            self.release()  # what is under way brings old values
        if self._secondary is not None:
            self._finish_copy()
            self._secondary.valid = False

    def _gather(self, site: str, *, asynchronous: bool) -> Handle:
        tag = Tag(Purpose.WEIGHT, self.key, site)
        source, axis, settled = self.shard, self.axis, self.sharded and self._keeper is None
        if self._secondary is not None and self._secondary.valid:
            source, axis, settled = self._secondary.shard, self._secondary.axis, False
        # Shards are settled: they change in updates and writes only, which end together.
        return self._job.communicator.all_gather(
            self.whole, source, axis, tag, asynchronous=asynchronous, settled=settled
        )

    def _show(self, values: Sequence[torch.Tensor]) -> None:
        if self.watch is not None:
            self.watch.check()
        self.refuse_changes()
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data = value
        self._shown, self._versions = values, [p._version for p in self.parameters]
        self._is_known = False
        self._note()
        if self.shown is not None:
            self.shown(values is not self._absent)

    def refuse_changes(self) -> None:
        """Refuse what scripts have changed in place or reassigned, where that would be lost now.

        Raises:
            TrainingError: names the parameter.
        """
        if self._is_known or not self._checks:
            return
        shown = zip(self.parameters, self._shown, self._versions, strict=True)
        for parameter, value, version in shown:
            if shows_client_tensor(parameter):
                continue  # changes are kept, or refused, when it ends
            if parameter._version != version or parameter.data_ptr() != value.data_ptr():
                name = self._job.parameters.info(parameter).name
                raise TrainingError(
                    f"parameter {name} was changed outside of drivetrain.whole(), in place, by "
                    "parameter.data = ..., or by a forward (such as nn.Embedding(max_norm=...)), "
                    "where only this rank has the change and it would be lost: change it inside "
                    "drivetrain.whole(parameters, write_rank=0)"
                )

    def begin_checks(self) -> None:
        """All parameters have been taken over from whoever had them before."""
        self._show(self._shown)  # who may have shown something since
        self._checks = True

    def hand_over(self) -> None:
        """Other states take the parameters over, one after another, or the client has them back."""
        self._checks, self.watch = False, None

    def trust_shown(self) -> None:
        """What the parameters show now is known, whoever has written it."""
        self._is_known = True

    def _note(self) -> None:
        if self.watch is not None:
            self.watch.note()

    # -- changes from outside -----------------------------------------------------------------

    def take_over(self, index: int) -> None:
        """Keep what the client wrote into gathered parameter ``index``: shard and master."""
        parameter, view = self.parameters[index], self._views[index]
        if parameter.data_ptr() != view.data_ptr() or not parameter.is_contiguous():
            view.copy_(parameter.detach().clone())  # it may be a view of the same memory
            parameter.data = view
        self._note()
        name = self._job.parameters.info(parameter).name
        self.forget_secondary()
        flat = view.reshape(-1)
        for segment in self.spec.segments:
            if segment.name == name:
                values = flat.narrow(0, segment.start, segment.numel)
                segment.of(self.shard).copy_(values.view_as(segment.of(self.shard)))
        self._changed = self._keeper is not None
        if not self.spec.has_masters:
            self.home.refresh()
            return
        for fragment in self.home.fragments():
            if fragment.name == name and fragment.kind == "master":
                start = next(s.start for s in self.spec.segments if s.name == name)
                values = flat.narrow(0, start, fragment.read().numel())
                fragment.write(values.to(fragment.dtype))

    def fragments(self, gradient: torch.Tensor | None) -> list[Fragment]:
        """Parameters, and gradients if there are any, of this rank's shard."""
        flats = {} if self.fetches else {"parameter": self.shard}
        if gradient is not None:
            flats["gradient"] = gradient
        return [
            segment_fragment(segment, kind, flat, "device")
            for segment in self.spec.segments
            for kind, flat in flats.items()
        ]


def _shard_spec(spec: BucketSpec, packing: Packing, rank: int, *, owner: bool) -> BucketSpec:
    """What a home is told of one shard of a bucket."""
    segments = [
        replace(
            spec.segments[part.index],
            start=part.start,
            numel=part.numel,
            offset=part.offset,
            owner=owner,
        )
        for part in packing.parts(rank)
    ]
    return replace(spec, numel=packing.shard, segments=tuple(segments))


def _absent(view: torch.Tensor) -> torch.Tensor:
    """What a released parameter shows: its shape, one number, and no memory."""
    number = float("nan") if view.is_floating_point() else 0
    return torch.full((), number, dtype=view.dtype, device=view.device).expand(view.shape)


def parameters_of(buckets: Sequence[ShardedBucket]) -> list[nn.Parameter]:
    """The parameters of several buckets, in their order."""
    return [parameter for bucket in buckets for parameter in bucket.parameters]
