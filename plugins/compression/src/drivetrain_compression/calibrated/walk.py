"""One pass over a calibration set, with one block of the model in memory at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from drivetrain.errors import ConfigError
from drivetrain.states.units import Unit, units
from drivetrain_compression.calibrated.activations import Activations
from drivetrain_compression.calibrated.first_inputs import Batch, Entered, entering
from drivetrain_compression.calibrated.modifiers import AfterTraining
from drivetrain_compression.calibrated.outside import Outside, ReadsOutside
from drivetrain_compression.calibrated.pairs import Call, output_of
from drivetrain_compression.calibrated.results import Rounded
from drivetrain_compression.calibrated.sources import Source
from drivetrain_compression.recipe.modifier import CompressionUnit, Progress
from drivetrain_compression.recipe.recipe import AnyModifier, Recipe

STATE = "state.json"
Report = Callable[[str, int, int], None]
"""Called with what is done, how many parts of it have passed, and of how many."""


@dataclass(frozen=True)
class Finished:
    """A block as it is to be kept.

    Args:
        name: its path.
        tensors: of the model, by full names, as the block computes with them.
        rounded: what was chosen for its layers, by full names.
        notes: what the user should know.
    """

    name: str
    tensors: Mapping[str, torch.Tensor]
    rounded: Mapping[str, Rounded]
    notes: tuple[str, ...] = ()


Keep = Callable[[int, Finished], None]
"""Called with the number of a block, and the block."""


@dataclass
class Walk:
    """A pass over the blocks of a model.

    Args:
        source: the model.
        recipe: of methods; each block sees them in the recipe's order.
        batches: the calibration data; may be empty if no method gathers.
        work: folder for what lies between blocks; a walk goes on there after a kill.
        keep: called when a block is finished, before the next one begins.
        report: told how far the walk is.
    """

    source: Source
    recipe: Recipe
    batches: Sequence[Batch]
    work: Path
    keep: Keep
    report: Report = field(default=lambda what, done, total: None)

    def run(self) -> None:
        """Compress all blocks that are not finished yet, and then what is outside of blocks.

        Raises:
            ConfigError: a method cannot work on a layer, or the model on the data; says which.
        """
        model = self.source.module
        blocks = units(model)
        assigned = self._assigned(blocks)
        self._outer = _Outer(self.work, self.recipe)
        self._outer.check(blocks, assigned)
        chain = bool(blocks[0].name)
        data = any(isinstance(m, AfterTraining) and m.gathers for m, _ in assigned.every())
        if data and not self.batches:
            raise ConfigError("the recipe needs calibration data, and there is none: give --data")
        if self.source.keeps:
            assigned.check()
        done = self._done()
        stage = _Stage(self, blocks, chain and data)  # what no method looks at need not pass
        if done < len(blocks):
            stage.enter(done)
        for number in range(done, len(blocks)):
            self._block(blocks[number], number, assigned.of(blocks[number].name), stage)
            stage.next(number, last=number + 1 == len(blocks))
            self._note(number + 1)
        self._rest(blocks, len(blocks))

    def _assigned(self, blocks: Sequence[Unit]) -> _Assigned:
        found = _Assigned()
        for modifier, own in self.recipe.assign(self.source.module):
            if not isinstance(modifier, AfterTraining):
                raise ConfigError(
                    f"{modifier.label} works in training only; name it in compression_training"
                )
            default = modifier.config.modules == ("*",)
            for unit in own:
                if unit.name or not blocks[0].name:
                    found.add(unit.name, modifier, unit)
                elif not default:
                    raise ConfigError(
                        f"{modifier.label}: {unit.targets[0].name} is outside of all blocks "
                        f"({blocks[0].name}, ...), and stays as it is; exclude it"
                    )
        return found

    def _block(
        self,
        block: Unit,
        number: int,
        methods: Sequence[tuple[AfterTraining[Any], CompressionUnit]],
        stage: _Stage,
    ) -> None:
        names = self.source.owned(block.module, block.name)
        self.source.load(names)
        rounded: dict[str, Rounded] = {}
        notes: list[str] = []
        for modifier, unit in methods:
            modifier.notes.clear()
            modifier.begin([unit])
            if modifier.gathers:
                number_seen = min(modifier.batches or len(self.batches), len(self.batches))
                for index in range(number_seen):
                    modifier.watch.kept = stage.kept(index)
                    stage.forward(block, number, index)
                    modifier.step(Progress(index + 1, number_seen))
                    self.report(f"{block.name} {modifier.label}", index + 1, number_seen)
            modifier.finish([unit])
            rounded |= modifier.results
            notes += [f"{modifier.label}: {note}" for note in modifier.notes]
        stage.pass_on(block, number)
        state = block.module.state_dict()
        dot = f"{block.name}." if block.name else ""
        tensors = {f"{dot}{name}": tensor.detach() for name, tensor in state.items()}
        self.keep(number, Finished(block.name, tensors, rounded, tuple(notes)))
        self.source.drop(names)

    def _rest(self, blocks: Sequence[Unit], number: int) -> None:
        inside = {f"{b.name}." for b in blocks}
        if "" in {b.name for b in blocks}:
            return
        every = self.source.owned(self.source.module, "")
        names = [n for n in every if not any(n.startswith(prefix) for prefix in inside)]
        self.source.load(names)
        self._outer.change(self.source)
        state = self.source.module.state_dict()
        seen: dict[int, str] = {}
        tensors = {}
        for name in names:  # what is tied is kept under its first name
            tensor = state[name]
            if seen.setdefault(tensor.data_ptr(), name) == name or not tensor.numel():
                tensors[name] = tensor.detach()
        self.keep(number, Finished("", tensors, {}))
        self.source.drop(names)

    def _done(self) -> int:
        path = self.work / STATE
        return int(json.loads(path.read_text("utf-8"))["done"]) if path.exists() else 0

    def _note(self, done: int) -> None:
        new = self.work / f"{STATE}.new"
        with new.open("w", encoding="utf-8") as file:
            json.dump({"done": done}, file)
            file.flush()
            os.fsync(file.fileno())
        new.rename(self.work / STATE)


class _Outer:
    """Methods that change what is outside of blocks: embeddings, the last norm, the head."""

    def __init__(self, work: Path, recipe: Recipe) -> None:
        self._methods = [m for m in recipe.modifiers if isinstance(m, ReadsOutside)]
        self._work, self._changed = work, False

    def check(self, blocks: Sequence[Unit], assigned: _Assigned) -> None:
        """Make sure that methods find work in every block, as what they change concerns all.

        Raises:
            ConfigError: the model has no blocks, or one of them no linear layers.
        """
        for method in self._methods:
            for block in blocks:
                kind = type(block.module).__name__
                if not block.name:
                    raise ConfigError(f"{method.label}: {kind} has no repeated blocks")
                if not any(known.label == method.label for known, _ in assigned.of(block.name)):
                    raise ConfigError(
                        f"{method.label}: {block.name} ({kind}) has no linear layers in repeated "
                        "blocks"
                    )

    def find(self, source: Source, blocks: Sequence[Unit], batch: Batch, tuples: bool) -> None:
        """Note what is to be changed, also for a job that goes on when all blocks are done."""
        for number, method in enumerate(self._methods):
            method.outside(source.module, blocks, batch, tuples).write(self._path(number))

    def try_blocks(
        self, model: nn.Module, blocks: Sequence[Unit], batch: Batch, tuples: bool
    ) -> None:
        """Let methods look at all blocks; where values are all there is, no change can be undone.

        Raises:
            ConfigError: a method refuses a block; nothing has been changed.
        """
        if not self._methods:
            return
        entered = entering(model, blocks, batch, tuples, None)
        hidden = entered.hidden
        for block, call in zip(blocks, entered.calls, strict=True):
            whole = Call((hidden, *call.args), call.kwargs)
            for method in self._methods:
                method.try_block(block, whole)
            with torch.no_grad():
                hidden = output_of(block.module, whole)

    def change(self, source: Source) -> None:
        """Change what has been loaded, unless it is changed already."""
        if self._changed and source.keeps:
            return
        for number, method in enumerate(self._methods):
            found = Outside.read(self._path(number))
            for name in found.untied:
                source.untie(f"{name}.weight")
            method.change_outside(source.module, found)
        self._changed = True

    def _path(self, number: int) -> Path:
        return self._work / f"outside-{number}.json"


class _Assigned:
    """Methods by block."""

    def __init__(self) -> None:
        self._of: dict[str, list[tuple[AfterTraining[Any], CompressionUnit]]] = {}

    def add(self, name: str, modifier: AfterTraining[Any], unit: CompressionUnit) -> None:
        self._of.setdefault(name, []).append((modifier, unit))

    def of(self, name: str) -> list[tuple[AfterTraining[Any], CompressionUnit]]:
        return self._of.get(name, [])

    def check(self) -> None:
        """Refuse layers that methods cannot change, before any of them is changed.

        Raises:
            ConfigError: says which and why.
        """
        for pairs in self._of.values():
            for modifier, unit in pairs:
                for target in unit.targets:
                    modifier.check(target)

    def every(self) -> list[tuple[AnyModifier, CompressionUnit]]:
        return [pair for pairs in self._of.values() for pair in pairs]


class _Stage:
    """The data as it comes to the current block."""

    def __init__(self, walk: Walk, blocks: Sequence[Unit], chain: bool) -> None:
        self._walk, self._blocks, self._chain = walk, blocks, chain
        self._entered: list[Entered] = []
        self._now: Activations | None = None
        self._later: Activations | None = None

    def enter(self, done: int) -> None:
        """Find what comes to the blocks; hidden states of block ``done`` may lie there already."""
        if not self._chain:
            return
        walk, source, blocks = self._walk, self._walk.source, self._blocks
        inside = tuple(f"{b.name}." for b in blocks)
        rest = [n for n in source.owned(source.module, "") if not n.startswith(inside)]
        first = source.owned(blocks[0].module, blocks[0].name)
        source.load([*rest, *first])
        tuples = self._tuples()
        source.drop(first)
        walk._outer.find(source, blocks, walk.batches[0], tuples)
        if source.keeps:
            walk._outer.try_blocks(source.module, blocks, walk.batches[0], tuples)
        walk._outer.change(source)
        hidden: list[torch.Tensor] = []
        before: Entered | None = None
        for index, batch in enumerate(walk.batches):
            before = entering(source.module, blocks, batch, tuples, before)
            self._entered.append(before)
            assert before.hidden is not None
            if not done:
                hidden.append(before.hidden)
            walk.report("the first block's inputs", index + 1, len(walk.batches))
            before = Entered(None, before.calls)
            self._entered[-1] = before
        source.drop(rest)
        if done:
            self._now = Activations.there(self._path(done))
            return
        self._now = self._file(0, [tuple(h.shape) for h in hidden], hidden[0].dtype)
        for index, values in enumerate(hidden):
            self._now[index] = values

    def forward(self, block: Unit, number: int, index: int) -> Any:
        """Run a block on a batch."""
        with torch.no_grad():
            if not self._chain:
                return block.module(**self._walk.batches[index])
            assert self._now is not None
            call = self._entered[index].calls[number]
            return block.module(self._now[index], *call.args, **call.kwargs)

    def pass_on(self, block: Unit, number: int) -> None:
        """Keep what the finished block returns for the next one."""
        if not self._chain or number + 1 == len(self._blocks):
            return
        assert self._now is not None
        self._later = self._file(number + 1, self._now.shapes, self._now.dtype)
        for index in range(len(self._now)):
            found = self.forward(block, number, index)
            self._later[index] = found[0] if isinstance(found, tuple) else found
            self._walk.report(f"{block.name} outputs", index + 1, len(self._now))
        self._later.flush()

    def next(self, number: int, *, last: bool) -> None:
        """Go to the next block; the data of the one before the current is not needed any more."""
        if self._now is not None and self._walk.work.exists():
            for old in range(number):
                for path in (self._path(old), self._path(old).with_suffix(".json")):
                    path.unlink(missing_ok=True)
        if last and self._now is not None:
            self._now.remove()
        self._now = self._later

    def kept(self, index: int) -> torch.Tensor | None:
        """Which tokens of a batch count: those that are not padding."""
        mask = self._walk.batches[index].get("attention_mask")
        return mask.bool() if isinstance(mask, torch.Tensor) and not bool(mask.all()) else None

    def _tuples(self) -> bool:
        """Whether blocks return tuples; tried on the first block and batch."""
        found: list[Any] = []
        first = self._blocks[0].module
        hook = first.register_forward_hook(
            lambda module, args, output: _note_and_stop(found, output)
        )
        try:
            with torch.no_grad():
                self._walk.source.module(**self._walk.batches[0])
        except _SeenError:
            return isinstance(found[0], tuple)
        finally:
            hook.remove()
        raise ConfigError(f"{self._blocks[0].name} is never called")

    def _path(self, number: int) -> Path:
        return self._walk.work / f"activations-{number}"

    def _file(self, number: int, shapes: Any, dtype: torch.dtype) -> Activations:
        return Activations(self._path(number), shapes, dtype, new=True)


class _SeenError(Exception):
    """The first block has returned."""


def _note_and_stop(found: list[Any], output: Any) -> None:
    found.append(output)
    raise _SeenError
