"""Checkpoints of DeepSpeed that are cut by tensor and pipeline parallelism, put together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from drivetrain.checkpoint.format.storage import LocalStorage
from drivetrain.errors import CheckpointError
from drivetrain_checkpoint_tools.conversion import Source
from drivetrain_checkpoint_tools.saved_states import Trained, partitioned, whole_tensors
from drivetrain_checkpoint_tools.tensor_slices import Rules, first_of_each, joined
from drivetrain_checkpoint_tools.torch_archive import read_pickled

_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
_TIED = re.compile(r"tied_modules\.[^.]+\.(.+)")

Layers = dict[int, dict[str, Any]]
"""Tensor-parallel rank -> name -> tensor of all layers of a pipeline; names begin with numbers."""


def read_parallel(
    folder: LocalStorage, files: Mapping[str, Mapping[str, Any]]
) -> tuple[list[Source], Trained]:
    """Whole tensors, masters and optimizer states of a checkpoint, however it is cut.

    Model-parallel rank ``i`` is tensor-parallel rank ``i % tp`` of stage ``i // tp``.

    Args:
        folder: of the checkpoint.
        files: name -> content of its model files.

    Raises:
        CheckpointError: parts are missing or do not fit together.
    """
    slices = _slices(folder, files)
    layers, nbytes = _layers(folder)
    ranks = _tensor_ranks(folder, slices, layers)
    found = [
        _of_tensor_rank(folder, slices, range(rank, len(slices), ranks), layers.get(rank))
        for rank in range(ranks)
    ]
    trained = replace(found[0][1], nbytes=nbytes + sum(states.nbytes for _, states in found))
    trained.weaker = list(dict.fromkeys(text for _, states in found for text in states.weaker))
    if ranks == 1:
        return found[0][0], trained
    shapes = {source.name: source.shape for source in found[0][0]}
    shapes |= {source.name: source.shape for source in found[0][1].sources if source.shape}
    rules = Rules.of(slices[0][0], shapes)
    trained.sources = list(joined(rules, [states.sources for _, states in found], folder.root))
    return list(joined(rules, [whole for whole, _ in found], folder.root)), trained


def _slices(
    folder: LocalStorage, files: Mapping[str, Mapping[str, Any]]
) -> list[list[Mapping[str, Any]]]:
    """For each model-parallel rank its model files, in the order of data-parallel ranks."""
    numbered: dict[int, list[tuple[int, Mapping[str, Any]]]] = {}
    for name, content in files.items():
        match = _MODEL_FILE.fullmatch(name)
        if match is None:
            raise CheckpointError(
                f"{folder.where(name)} has parts of experts, which are not imported"
            )
        numbered.setdefault(int(match[2]), []).append((int(match[1] or 0), content))
    if sorted(numbered) != list(range(len(numbered))):
        raise CheckpointError(
            f"{folder.root} has model states of model-parallel ranks {sorted(numbered)} only"
        )
    by_number = [sorted(numbered[rank], key=lambda pair: pair[0]) for rank in sorted(numbered)]
    return [[content for _, content in pairs] for pairs in by_number]


def _layers(folder: LocalStorage) -> tuple[Layers, int]:
    """Tensors of all layers of a pipeline, and the bytes of their files."""
    found: Layers = {}
    nbytes = 0
    places = [(m, name) for name in folder.names() if (m := _LAYER_FILE.fullmatch(name))]
    for match, name in sorted(places, key=lambda pair: (int(pair[0][1]), int(pair[0][2]))):
        read = read_pickled(folder, name)
        nbytes += read.nbytes
        own = found.setdefault(int(match[2]), {})
        own |= {f"{int(match[1])}.{key}": value for key, value in read.content.items()}
    numbers = {rank: {key.split(".")[0] for key in own} for rank, own in found.items()}
    if sorted(found) != list(range(len(found))) or len(set(map(frozenset, numbers.values()))) > 1:
        raise CheckpointError(f"{folder.root} lacks layers of some tensor-parallel ranks")
    return found, nbytes


def _tensor_ranks(
    folder: LocalStorage, slices: Sequence[Sequence[Mapping[str, Any]]], layers: Layers
) -> int:
    """How many ranks share a layer."""
    sizes = slices[0][0].get("checkpoint_parallel_dimensions") or {}
    ranks = sizes.get("tp_degree") or len(layers) or len(slices)
    known = type(ranks) is int and ranks >= 1 and len(layers) in (0, ranks)
    stages = sizes.get("pp_degree") or len(slices) // ranks if known else 0
    if len(slices) != stages * ranks:
        raise CheckpointError(
            f"{folder.root} has model states of {len(slices)} model-parallel ranks, and layers of "
            f"{len(layers)} tensor-parallel ones, which {ranks!r} ranks for each layer do not fit"
        )
    return ranks


def _of_tensor_rank(
    folder: LocalStorage,
    slices: Sequence[Sequence[Mapping[str, Any]]],
    stages: Sequence[int],
    layers: Mapping[str, Any] | None,
) -> tuple[list[Source], Trained]:
    """Tensors and states of one tensor-parallel rank, of all stages of a pipeline."""
    whole: list[Source] = []
    trained: list[Trained] = []
    if layers is not None:
        whole = whole_tensors({**slices[0][0], "module": layers}, ())
    for number in stages:
        model = slices[number][0]
        if layers is None:
            whole += whole_tensors(model, slices[number])
        trained.append(partitioned(folder, model, number))
    names = _untied({source.name: source.shape for source in whole})
    total = replace(trained[0], groups=[])
    total.sources = first_of_each(
        replace(source, name=names(source.name, source.shape))
        for states in trained
        for source in states.sources
    )
    for states in trained:
        for number, group in enumerate(states.groups):
            own = [names(name, None) for name in group["parameters"]]
            if number == len(total.groups):
                total.groups.append({**group, "parameters": []})
            known = total.groups[number]["parameters"]
            known += [name for name in own if name not in known]
    total.nbytes = sum(states.nbytes for states in trained)
    total.weaker = [text for states in trained for text in states.weaker]
    return first_of_each(whole), total


def _untied(shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """Names of layers for those under which a pipeline trains what several stages have."""

    def name_of(name: str, shape: tuple[int, ...] | None) -> str:
        match = _TIED.fullmatch(name)
        if match is None:
            return name
        fits = (n for n, s in shapes.items() if n.partition(".")[2] == match[1])
        return next((n for n in fits if shape in (None, (), shapes[n])), name)

    return name_of
