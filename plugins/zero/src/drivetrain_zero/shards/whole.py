"""How the parameters of one bucket become whole, and what of them this rank keeps.

There is one class for each way: :class:`AlwaysWhole` and :class:`RoundedWhole` at stages 1 and 2,
:class:`GatheredWhole`, :class:`FetchedWhole` and :class:`JoinedWhole` where parameters are released
between uses. :func:`whole_of` chooses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from drivetrain.contracts import Handle, ParameterHome, Purpose, Tag
from drivetrain_zero.shards.secondary import SecondaryShard
from drivetrain_zero.shards.shown import ShownParameters, absent_like
from drivetrain_zero.shards.whole_memory import WholeMemory

if TYPE_CHECKING:
    from drivetrain.contracts import Axis, StateHome
    from drivetrain_zero.shards.layout import Layout


class WholeParameters:
    """The parameters of a bucket, whole or as this rank's shard.

    The way of a use, on every rank: ``fetch_ahead`` (not collective) -> ``start`` -> ``finish`` ->
    ``release``. That of an update: ``publish`` -> ``finish_publish``.

    Args:
        layout: of the parameters.
        shown: what they show; told by this object.

    Attributes:
        flat: all parameters [numel of the packing]; its memory may come and go.
        views: every parameter's place in ``flat``.
        shard: this rank's part [shard of the packing], as it is updated.
        fetches: whether the shard comes from elsewhere before it is gathered.
        is_temporary: whether parameters are released between uses.
    """

    flat: torch.Tensor
    shard: torch.Tensor
    fetches = False
    is_temporary = False
    _secondary: SecondaryShard | None = None

    def __init__(self, layout: Layout, shown: ShownParameters) -> None:
        self._layout = layout
        self._shown = shown
        self._handle: Handle | None = None

    def _use(self, flat: torch.Tensor) -> None:
        self.flat, self.views = flat, self._layout.views_of(flat)

    def place_of(self, index: int) -> torch.Tensor | None:
        """Return what parameter ``index`` shows, if it shows the same all the time."""
        return None if self.is_temporary else self.views[index]

    def fill(self, originals: torch.Tensor) -> None:
        """Take the first values [numel] of all parameters, equal on all ranks."""
        raise NotImplementedError

    def adopted(self) -> None:
        """The home has taken its states from the shard. Collective."""

    def fetch_ahead(self) -> None:
        """Begin to bring this rank's shard to where it is gathered from. Not collective."""

    def start(self, *, asynchronous: bool, again: bool = False) -> None:
        """Begin to make the parameters whole, for reading. Collective.

        Args:
            asynchronous: go on meanwhile.
            again: also where they are whole already, to take part in what others need.
        """

    def finish(self) -> None:
        """Return once the parameters are whole."""

    def gather_private(self) -> None:
        """Make the parameters whole in memory of this rank's own, unrounded. Collective."""

    def release(self) -> None:
        """Give the whole up again; the shard stays. Collective where it was shown unrounded."""

    def publish(self) -> None:
        """After an update, begin to show all shards to every rank, where parameters stay whole."""

    def finish_publish(self) -> None:
        """Return once every rank has what was published."""

    def shard_changes(self) -> None:
        """Let the next gather be made from the shard, which has changed or is about to."""

    def keep_shard(self) -> None:
        """Take the shard for the right values, which a client has written. Not collective."""

    def keep_secondary(self, axis: Axis) -> None:
        """From now on, gather from a second shard over ``axis`` where that is up to date (hpZ)."""


class AlwaysWhole(WholeParameters):
    """Parameters are whole all the time, and the shard is a slice of them."""

    def __init__(self, layout: Layout, shown: ShownParameters) -> None:
        super().__init__(layout, shown)
        self._use(layout.buffer(layout.packing.numel))
        self.shard = layout.shard_of(self.flat)

    def fill(self, originals: torch.Tensor) -> None:
        self.flat.copy_(originals)
        self._shown.show(self.views, True)

    def publish(self) -> None:
        if self._layout.packing.ranks > 1:
            self._handle = self._gather(asynchronous=True)

    def finish_publish(self) -> None:
        if self._handle is not None:
            self._handle.wait()
            self._handle = None

    def _gather(self, *, asynchronous: bool) -> Handle:
        tag = Tag(Purpose.WEIGHT, self._layout.key, "publish")
        return self._layout.gather(self.flat, self.shard, tag, asynchronous=asynchronous)


class RoundedWhole(AlwaysWhole):
    """Parameters are whole all the time, but rounded (qwZ); the shard is exact, in other memory."""

    def __init__(self, layout: Layout, shown: ShownParameters) -> None:
        super().__init__(layout, shown)
        self.shard = layout.buffer(layout.packing.shard)
        self._is_exact = False

    def fill(self, originals: torch.Tensor) -> None:
        self.shard.copy_(self._layout.shard_of(originals))
        super().fill(originals)

    def adopted(self) -> None:
        self.publish()
        self.finish_publish()

    def gather_private(self) -> None:
        if not self._is_exact:
            self._layout.gather(self.flat, self.shard, _exact_tag(self._layout))
            self._shown.note_values()
            self._is_exact = True

    def release(self) -> None:
        if self._is_exact:
            self._gather(asynchronous=False)
            self._shown.note_values()
            self._is_exact = False


class GatheredWhole(WholeParameters):
    """Parameters are whole in memory that comes and goes; the shard has its own.

    The whole's storage object stays: tensors that autograd has saved are views of it, and hold the
    right values again once it is gathered for backward.

    Args:
        layout: of the parameters.
        shown: what they show.
        rounds: the communicator rounds what it gathers (qwZ).
        home: that keeps the parameters, if one does.
    """

    is_temporary = True

    def __init__(
        self,
        layout: Layout,
        shown: ShownParameters,
        *,
        rounds: bool = False,
        home: ParameterHome | None = None,
    ) -> None:
        super().__init__(layout, shown)
        self._rounds = rounds
        self._memory = WholeMemory(layout.packing.numel, layout.dtype, layout.device, home)
        self._use(self._memory.tensor)
        self.shard = self._make_shard()
        self._absent = [absent_like(view) for view in self.views]
        self._is_whole = self._is_exact = False
        self._free()

    def _make_shard(self) -> torch.Tensor:
        return self._layout.buffer(self._layout.packing.shard)

    def fill(self, originals: torch.Tensor) -> None:
        self.shard.copy_(self._layout.shard_of(originals))
        self._shown.show(self._absent, False)

    def keep_secondary(self, axis: Axis) -> None:
        self._secondary = SecondaryShard(self._layout, axis)

    def start(self, *, asynchronous: bool, again: bool = False) -> None:
        if self._handle is None and (again or not self._is_whole):
            if not self._is_whole:
                self._take()
            self._handle = self._gather(asynchronous=asynchronous)

    def finish(self) -> None:
        self._complete()

    def _complete(self) -> None:
        """Return once nothing is on its way, and show what has come."""
        if self._handle is not None:
            self._handle.wait()
            self._handle = None
            if self._secondary is not None and not self._secondary.is_filled:
                self._secondary.fill(self.flat)
            self._shown.show(self.views, True)
            self._is_whole = True

    def gather_private(self) -> None:
        self._memory.is_lent = True
        self.start(asynchronous=False)
        self.finish()
        if self._rounds and not self._is_exact:
            self._take_exact_shard()
            self._layout.gather(self.flat, self.shard, _exact_tag(self._layout))
            self._shown.note_values()
            self._is_exact = True

    def release(self) -> None:
        self._complete()
        if self._is_whole:
            self._shown.show(self._absent, False)
            self._free()
            self._is_whole = self._is_exact = False

    def publish(self) -> None:
        self.shard_changes()

    def shard_changes(self) -> None:
        if self._secondary is not None:
            self._complete()
            self._secondary.is_filled = False

    def _take(self) -> None:
        """Have memory to gather to, and the shard where it is gathered from."""
        self._memory.take()

    def _take_exact_shard(self) -> None:
        """Have the shard as it is updated."""

    def _free(self) -> None:
        """Give back the memory of the whole."""
        if self._memory.leave_to_clients():
            self._use(self._memory.tensor)
        self._memory.give_back()

    def _gather(self, *, asynchronous: bool) -> Handle:
        tag = Tag(Purpose.WEIGHT, self._layout.key, "gather")
        if self._secondary is not None and self._secondary.is_filled:
            return self._secondary.gather(self.flat, tag, asynchronous=asynchronous)
        # Shards change in updates and writes only, which end together on all ranks.
        return self._layout.gather(
            self.flat, self.shard, tag, asynchronous=asynchronous, settled=not self.fetches
        )


class FetchedWhole(GatheredWhole):
    """A home keeps the shard, which is fetched to its place in the whole and gathered there.

    A single rank releases its parameters, too.

    Args:
        layout: of the parameters.
        shown: what they show.
        home: keeps the shard.
        rounds: the communicator rounds what it gathers (qwZ).
    """

    fetches = True

    def __init__(
        self, layout: Layout, shown: ShownParameters, home: ParameterHome, *, rounds: bool
    ) -> None:
        self._home = home
        self._is_fetching = self._is_changed = False
        super().__init__(layout, shown, rounds=rounds, home=home)

    def _make_shard(self) -> torch.Tensor:
        return self._layout.shard_of(self.flat)

    def fill(self, originals: torch.Tensor) -> None:
        self._memory.take()
        super().fill(originals)

    def adopted(self) -> None:
        self._free()

    def fetch_ahead(self) -> None:
        idle = not (self._is_whole or self._is_fetching) and self._handle is None
        if idle and (self._secondary is None or not self._secondary.is_filled):
            self._memory.take()
            self._home.fetch(self.shard)
            self._is_fetching = True

    def release(self) -> None:
        self._complete()
        if self._is_changed:
            self._home.keep(self.shard)
            self._is_changed = False
        if self._is_fetching:
            self._finish_fetch()
            self._free()
        super().release()

    def shard_changes(self) -> None:
        if self._is_fetching:
            self.release()  # what is under way brings old values
        super().shard_changes()

    def keep_shard(self) -> None:
        self._is_changed = True

    def _take(self) -> None:
        self.fetch_ahead()
        self._finish_fetch()
        self._memory.take()

    def _take_exact_shard(self) -> None:
        self._home.fetch(self.shard)  # its place holds what was gathered, rounded
        self._home.fetched()

    def _finish_fetch(self) -> None:
        if self._is_fetching:
            self._home.fetched()
            self._is_fetching = False

    def _use(self, flat: torch.Tensor) -> None:
        super()._use(flat)
        self.shard = self._make_shard()


class JoinedWhole(GatheredWhole):
    """Ranks share memory: the row of all shards is the whole, and gathering shows it.

    Nothing is copied for reading. A script that may write gets a copy.

    Args:
        layout: of the parameters.
        shown: what they show.
        row: all shards, one after another.
    """

    def __init__(self, layout: Layout, shown: ShownParameters, row: torch.Tensor) -> None:
        self._row = row
        self._row_views = layout.views_of(row)
        self._shows_row = False
        super().__init__(layout, shown)

    def _make_shard(self) -> torch.Tensor:
        return self._layout.shard_of(self._row)

    def keep_secondary(self, axis: Axis) -> None:
        pass  # nothing travels that it could save

    def start(self, *, asynchronous: bool, again: bool = False) -> None:
        pass

    def finish(self) -> None:
        if not self._is_whole:
            self._shown.show(self._row_views, True)
            self._is_whole = self._shows_row = True

    def gather_private(self) -> None:
        if self._shows_row:
            self._is_whole = self._shows_row = False
        self._memory.is_lent = True
        super().start(asynchronous=False)
        self._complete()

    def release(self) -> None:
        super().release()
        self._shows_row = False


def whole_of(
    layout: Layout, shown: ShownParameters, home: StateHome, *, released: bool, rounds: bool
) -> WholeParameters:
    """Choose how the parameters of a bucket become whole.

    Args:
        layout: of the parameters.
        shown: what they show.
        home: of the bucket's states, which may keep the parameters.
        released: parameters are released between uses.
        rounds: the communicator rounds what it gathers (qwZ).
    """
    if isinstance(home, ParameterHome):
        return FetchedWhole(layout, shown, home, rounds=rounds)
    if not released:
        return RoundedWhole(layout, shown) if rounds else AlwaysWhole(layout, shown)
    row = None if rounds else layout.joined_shards()
    if row is not None:
        return JoinedWhole(layout, shown, row)
    return GatheredWhole(layout, shown, rounds=rounds)


def _exact_tag(layout: Layout) -> Tag:
    return Tag(Purpose.STATE, layout.key, "exact")
