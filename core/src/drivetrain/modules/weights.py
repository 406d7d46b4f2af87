"""Where values of parameters and buffers are read from: files of any layout, or a mapping."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch

from drivetrain.checkpoint.format.index import LATEST, MANIFEST, Stored, StoredTensor
from drivetrain.checkpoint.format.reading import check_coverage, refuse_complex, restore
from drivetrain.checkpoint.format.safetensors_file import find_weights, open_weights, stored_tensors
from drivetrain.checkpoint.format.storage import Storage, open_storage
from drivetrain.checkpoint.opening import opened
from drivetrain.contracts.state.fragment import Fragment
from drivetrain.errors import CheckpointError
from drivetrain.states.device_home import tensor_fragment


class Weights(ABC):
    """Whole tensors by name, of which a rank reads its boxes.

    Args:
        place: what messages call them.
    """

    def __init__(self, place: str) -> None:
        self.place = place

    @abstractmethod
    def names(self) -> Collection[str]:
        """Names of all parameters and buffers."""

    @abstractmethod
    def shown(self, name: str) -> torch.Tensor:
        """A tensor without memory, of the shape and dtype of the one called ``name``.

        Raises:
            CheckpointError: it is none.
        """

    def check(self, name: str, fragment: Fragment) -> None:
        """Make sure that the tensor ``name`` can fill ``fragment``; reads no values.

        Raises:
            CheckpointError: shapes differ, a part is missing, or imaginary parts would be lost.
        """
        found = self.shown(name)
        if tuple(found.shape) != fragment.global_shape:
            raise CheckpointError(
                f"{name} has shape {list(fragment.global_shape)} in the model, but shape "
                f"{list(found.shape)} in {self.place}"
            )
        refuse_complex(name, fragment, found.dtype, self.place)

    def whole(self, name: str) -> torch.Tensor:
        """The tensor ``name`` in host memory.

        Raises:
            CheckpointError: bytes are damaged.
        """
        found = torch.empty_like(self.shown(name), device="cpu")
        self.fill([(name, tensor_fragment(name, "parameter", found, owner=False))])
        return found

    @abstractmethod
    def fill(self, work: Sequence[tuple[str, Fragment]]) -> None:
        """Overwrite fragments with the boxes of named tensors, in the fragments' dtypes.

        Raises:
            CheckpointError: bytes are damaged; names the tensor.
        """


class MappedWeights(Weights):
    """Values of a mapping such as a ``state_dict``; whatever has a shape and can be indexed."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__("the mapping of weights")
        self._values = values

    def names(self) -> Collection[str]:
        return self._values.keys()

    def shown(self, name: str) -> torch.Tensor:
        value = self._values[name]
        shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
        if shape is None:
            raise CheckpointError(f"{name} is no tensor in {self.place}")
        known = dtype if isinstance(dtype, torch.dtype) else None
        return torch.empty(tuple(shape), dtype=known, device="meta")

    def fill(self, work: Sequence[tuple[str, Fragment]]) -> None:
        for name, fragment in work:
            fill(fragment, self._values[name])


class FileWeights(Weights):
    """Tensors in files, of which only the bytes of wanted boxes are read.

    Args:
        place: what messages call them.
        storage: with the files.
        tensors: by name.
        exact: masters by name, read in place of a parameter that is saved in another dtype than
            the one wanted.
    """

    def __init__(
        self,
        place: str,
        storage: Storage,
        tensors: Mapping[str, StoredTensor],
        exact: Mapping[str, StoredTensor] | None = None,
    ) -> None:
        super().__init__(place)
        self._storage = storage
        self._tensors = tensors
        self._exact = exact or {}

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def check(self, name: str, fragment: Fragment) -> None:
        check_coverage(fragment, self._source(name, fragment), self.place)

    def fill(self, work: Sequence[tuple[str, Fragment]]) -> None:
        restore(self._storage, [(f, self._source(name, f)) for name, f in work])

    def shown(self, name: str) -> torch.Tensor:
        found = self._tensors[name]
        return torch.empty(found.shape, dtype=found.dtype, device="meta")

    def _source(self, name: str, fragment: Fragment) -> StoredTensor:
        found = self._tensors[name]
        return found if found.dtype == fragment.dtype else self._exact.get(name, found)


@contextmanager
def weights_at(place: str | os.PathLike[str]) -> Iterator[Weights]:
    """Open a Drivetrain checkpoint, a run's folder of checkpoints, or safetensors files.

    Args:
        place: a checkpoint's folder or that of a run, of which ``latest`` counts; a folder with
            ``model.safetensors`` or its index; or one safetensors file. A path or a URL.

    Raises:
        CheckpointError: there is nothing of that kind, or it is damaged.
    """
    where = os.fspath(place)
    folder, _, file = where.rpartition("/")
    if file.endswith(".safetensors"):
        with closing(open_storage(folder or ".")) as storage:
            yield FileWeights(where, storage, stored_tensors(storage, file))
        return
    with closing(open_weights(where)) as storage:
        if not {MANIFEST, LATEST}.intersection(storage.names()):
            yield FileWeights(where, storage, find_weights(storage))
            return
    with opened(where) as stored:
        yield _of_checkpoint(stored)


def _of_checkpoint(stored: Stored) -> FileWeights:
    found: dict[str, dict[str, StoredTensor]] = {"parameter": {}, "buffer": {}, "master": {}}
    for kind, name in stored.keys:
        tensor = stored.find(kind, name) if kind in found else None
        if tensor is not None:
            found[kind][name] = tensor
    tensors = {**found["master"], **found["buffer"], **found["parameter"]}
    return FileWeights(stored.place, stored.storage, tensors, found["master"])


def fill(fragment: Fragment, whole: Any) -> None:
    """Overwrite a fragment with its boxes of a whole tensor, converted to its dtype."""
    flat = fragment.read()
    for box in fragment.boxes:
        box.of_storage(flat).copy_(box.of(whole))
    fragment.write(flat)
