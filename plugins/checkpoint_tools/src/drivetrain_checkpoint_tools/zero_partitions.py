"""How ZeRO cuts masters and optimizer states over ranks, and how they are put together.

Stages 1 and 2 flatten each parameter group and cut it evenly; every rank says which part of which
parameter its partition holds. Stage 3 cuts each parameter by itself into equal parts, the last one
padded, and strings a rank's parts together in the order of the parameters.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch

from drivetrain.checkpoint.format.index import shown
from drivetrain.errors import CheckpointError
from drivetrain_checkpoint_tools.conversion import Source

Slices = list[tuple[torch.Tensor, int, int]]
"""Flat tensors, with start and number of elements of what is taken of each."""


@dataclass(frozen=True)
class Partitioned:
    """The parts of one checkpoint.

    Args:
        shapes: name -> shape of every trained parameter.
        slices: (kind, name) -> the parts in order.
        steps: name -> updates seen.
        groups: hyper-parameters with the names of their parameters.
        place: for messages.
    """

    shapes: Mapping[str, tuple[int, ...]]
    slices: Mapping[tuple[str, str], Slices]
    steps: Mapping[str, int]
    groups: list[dict[str, Any]]
    place: str

    @classmethod
    def of(
        cls, ranks: Sequence[Mapping[str, Any]], shapes: Sequence[Mapping[str, Any]], place: str
    ) -> Partitioned:
        """Find the parts.

        Args:
            ranks: the optimizer states of every rank.
            shapes: name -> shape, for each parameter group.
            place: for messages.

        Raises:
            KeyError, TypeError, AttributeError, IndexError: they are laid out in another way.
        """
        stage = int(ranks[0]["zero_stage"])
        plain = [{name: tuple(shape) for name, shape in group.items()} for group in shapes]
        if stage == 3:
            slices, steps, inner = _stage_3(ranks, plain)
        else:
            slices, steps, inner = _stages_1_and_2(ranks, plain)
        hyper = inner["param_groups"]
        groups = [
            {"parameters": list(names), "hyper": {k: v for k, v in h.items() if k != "params"}}
            for names, h in zip(plain, hyper, strict=False)
        ]
        merged = {name: shape for group in plain for name, shape in group.items()}
        return cls(merged, slices, steps, groups, place)


def part_sources(parts: Partitioned) -> Iterator[Source]:
    """A source for every master, optimizer state and update count."""
    for (kind, name), slices in parts.slices.items():
        shape, dtype = parts.shapes[name], slices[0][0].dtype
        held = sum(numel for _, _, numel in slices)
        if held != prod(shape):
            raise CheckpointError(
                f"{shown(name)} ({shown(kind)}) in {parts.place} has {held:,} elements, "
                f"expected {reprlib.repr(shape)}"
            )
        yield Source(kind, name, dtype, shape, partial(_put_together, slices, shape))
    for name, step in parts.steps.items():
        count = torch.tensor(step)
        yield Source("step", name, torch.int64, (), partial(torch.clone, count))


def _put_together(slices: Slices, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.cat([flat.narrow(0, start, numel) for flat, start, numel in slices]).view(shape)


def _flats(master: torch.Tensor, state: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Kind -> flat tensor of a partition: its masters, and states of their length."""
    yield "master", master
    for kind, value in state.items():
        if isinstance(value, torch.Tensor) and value.dim() and value.numel() >= master.numel():
            yield kind, value.view(-1)


def _stages_1_and_2(
    ranks: Sequence[Mapping[str, Any]], shapes: Sequence[Mapping[str, tuple[int, ...]]]
) -> tuple[dict[tuple[str, str], Slices], dict[str, int], Mapping[str, Any]]:
    slices: dict[tuple[str, str], Slices] = {}
    steps: dict[str, int] = {}
    for rank in ranks:
        inner = rank["base_optimizer_state"]
        masters = rank["single_partition_of_fp32_groups"]
        for group, (names, master) in enumerate(zip(shapes, masters, strict=True)):
            state = inner["state"].get(group, {})
            for name, address in rank["param_slice_mappings"][group].items():
                start, numel = int(address.start), int(address.numel)
                steps[name] = int(state.get("step", 0))
                for kind, flat in _flats(master, state) if name in names else ():
                    if start < 0 or start + numel > flat.numel():
                        raise IndexError(f"{name} lies outside of its partition")
                    slices.setdefault((kind, name), []).append((flat, start, numel))
    return slices, steps, ranks[0]["base_optimizer_state"]


def _stage_3(
    ranks: Sequence[Mapping[str, Any]], shapes: Sequence[Mapping[str, tuple[int, ...]]]
) -> tuple[dict[tuple[str, str], Slices], dict[str, int], Mapping[str, Any]]:
    slices: dict[tuple[str, str], Slices] = {}
    steps: dict[str, int] = {}
    everything = {name: shape for group in shapes for name, shape in group.items()}
    for number, rank in enumerate(ranks):
        inner = rank["optimizer_state_dict"]
        pieces = [
            (int(inner["state"].get(tile, {}).get("step", 0)), dict(_flats(master, state)))
            for tile, master in enumerate(rank["fp32_flat_groups"])
            for state in [inner["state"].get(tile, {})]
        ]
        tile, at = 0, 0
        for name, shape in everything.items():
            share = -(-prod(shape) // len(ranks))
            held = max(0, min(share, prod(shape) - number * share))
            while at == pieces[tile][1]["master"].numel() and share:
                tile, at = tile + 1, 0
            step, flats = pieces[tile]
            steps[name] = step
            for kind, flat in flats.items():
                if at + held > flat.numel():
                    raise IndexError(f"{name} lies outside of its partition")
                slices.setdefault((kind, name), []).append((flat, at, held))
            at += share
    return slices, steps, ranks[0]["optimizer_state_dict"]
