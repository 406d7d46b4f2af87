"""Values read into modules without memory: this rank's boxes, from files of any layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from halves import Net
from test_materialize import SGD, Tensors, empty_net, made_in_parts, open_job
from torch import nn

import drivetrain
from drivetrain.checkpoint.format.storage import LocalStorage
from drivetrain.checkpoint.format.tensor_file import TensorEntry, write_tensors
from drivetrain.errors import CheckpointError, ConfigError
from drivetrain.testing import run_distributed


def numbered() -> Tensors:
    """A value for everything in the ``state_dict``, which tells its place."""
    found: Tensors = {}
    for number, (name, tensor) in enumerate(Net().state_dict().items()):
        if name != "head.weight":  # is tied
            count = torch.arange(tensor.numel()).view(tensor.shape)
            found[name] = (count + 100 * number).to(tensor.dtype)
    return found


def write(path: Path, tensors: Tensors) -> None:
    entries = [
        TensorEntry(name, t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()
    ]
    with LocalStorage(str(path.parent)).writing(path.name) as sink:
        write_tensors(sink, sorted(entries, key=lambda entry: -entry.dtype.itemsize))


def as_mapping(folder: Path) -> Any:
    return numbered()


def as_file(folder: Path) -> Any:
    write(folder / "any.safetensors", numbered())
    return folder / "any.safetensors"


def as_files(folder: Path) -> Any:
    names = list(numbered())
    shards = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for file, own in shards.items():
        write(folder / file, {name: numbered()[name] for name in own})
    weights = {name: file for file, own in shards.items() for name in own}
    index = {"weight_map": weights, "metadata": {}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def as_checkpoint(folder: Path) -> Any:
    run_distributed(save, 2, str(folder))
    return str(folder)


def as_checkpoint_by_tag(folder: Path) -> Any:
    return Path(as_checkpoint(folder)) / "t"


def save(folder: str) -> None:
    """Save what :func:`numbered` has, cut otherwise than it will be read."""
    with open_job(2, 2, bf16={"enabled": True}, **SGD) as job:
        engine = job.engine(empty_net(), weights=numbered())
        engine.save_checkpoint(folder, "t")


@pytest.mark.parametrize("source", [as_mapping, as_file, as_files, as_checkpoint_by_tag])
@pytest.mark.parametrize("world", [1, 2])
def test_values_are_read_by_name_and_box(
    source: Callable[[Path], Any], world: int, tmp_path: Path
) -> None:
    weights = source(tmp_path)
    for found in run_distributed(made_in_parts, world, weights, world):
        assert torch.equal(found.pop("angles.table"), torch.arange(4) / 4 + 1)
        for name, values in numbered().items():
            assert found[name].dtype == values.dtype
            assert torch.equal(found.pop(name), values), name
        assert not found


def test_a_runs_folder_means_its_latest_checkpoint(tmp_path: Path) -> None:
    module = empty_net()
    folder = as_checkpoint(tmp_path)
    with open_job() as job:
        drivetrain.materialize(module, folder, job=job)
    # Beyond 256, bfloat16 has no odd numbers; the checkpoint has masters too, which do.
    assert torch.equal(module.second.weight, numbered()["second.weight"])
    assert numbered()["second.weight"].max() > 256


def bytes_read(weights: str, world: int) -> int:
    count = 0
    read = LocalStorage.read

    def counted(self: LocalStorage, path: str, offset: int, into: Any) -> None:
        nonlocal count
        count += memoryview(into).nbytes
        read(self, path, offset, into)

    with open_job(world, world) as job, patch.object(LocalStorage, "read", counted):
        job.engine(empty_net(1 << 15), weights=weights)
    return count


def test_only_the_bytes_of_own_boxes_are_read(tmp_path: Path) -> None:
    tensors = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in state(1 << 15).items()}
    write(tmp_path / "model.safetensors", tensors)
    cut = sum(tensors[name].nbytes for name in ("first.weight", "first.bias"))
    whole = (tmp_path / "model.safetensors").stat().st_size
    (alone,) = run_distributed(bytes_read, 1, str(tmp_path), 1)
    assert whole <= alone <= 1.05 * whole
    # A row of the second weight is halved too, but the halves lie too close together to skip one.
    for part in run_distributed(bytes_read, 2, str(tmp_path), 2):
        assert part <= 1.05 * whole - cut / 2


def state(width: int) -> Tensors:
    with torch.device("meta"):
        found = Net(width).state_dict()
    del found["head.weight"]
    return found


# -- what does not fit -----------------------------------------------------------------------------


def refused(weights: Any) -> str:
    module = empty_net()
    with open_job(2, 2) as job:
        with pytest.raises(CheckpointError) as raised:
            job.engine(module, weights=weights)
        assert module.norm.weight.is_meta
    return str(raised.value)


def test_everything_that_does_not_fit_is_listed_on_every_rank(tmp_path: Path) -> None:
    tensors = numbered()
    del tensors["second.bias"], tensors["norm.running_mean"]
    tensors["first.weight"] = torch.zeros(9, 4)
    tensors["norm.weight"] = torch.zeros(7)
    tensors["norm.bias"] = torch.zeros(8, dtype=torch.complex64)
    tensors["extra"] = torch.zeros(1)
    write(tmp_path / "model.safetensors", tensors)
    for weights in (tensors, str(tmp_path)):
        for text in run_distributed(refused, 2, weights):
            assert "lacks norm.running_mean, second.bias" in text
            assert "has extra, which no rank's module has" in text
            assert "first.weight" in text
            assert "[8, 4]" in text
            assert "[9, 4]" in text
            assert "in the model, but complex (torch.complex64)" in text
            assert "norm.weight" in text


@pytest.mark.parametrize("weights", ["nowhere", "none.safetensors"])
def test_files_that_are_not_there_are_named(weights: str, tmp_path: Path) -> None:
    for text in run_distributed(refused, 2, str(tmp_path / weights)):
        assert "the module gets no weights" in text
        assert weights in text


def missing_on_one_rank() -> str:
    with open_job(2, 2) as job:
        tensors = numbered()
        if job.rank == 1:
            del tensors["second.bias"]
        with pytest.raises(CheckpointError) as raised:
            drivetrain.materialize(empty_net(), tensors, job=job)
    return str(raised.value)


def test_what_one_rank_misses_is_an_error_on_all() -> None:
    for text in run_distributed(missing_on_one_rank, 2):
        assert "rank 1: the mapping of weights lacks second.bias" in text


@pytest.mark.parametrize("other", [0.0, 1.0])
def test_tied_tensors_may_be_stored_under_both_names_if_they_agree(other: float) -> None:
    tensors, module = numbered(), empty_net()
    tensors["head.weight"] = tensors["tokens.weight"] + other
    with open_job() as job:
        if not other:
            drivetrain.materialize(module, tensors, job=job)
            assert module.head.weight is module.tokens.weight
            return
        with pytest.raises(CheckpointError, match=r"tokens.weight and head.weight are tied"):
            drivetrain.materialize(module, tensors, job=job)


def test_a_tied_tensor_may_be_stored_under_its_second_name() -> None:
    tensors, module = numbered(), empty_net()
    tensors["head.weight"] = tensors.pop("tokens.weight")
    with open_job() as job:
        drivetrain.materialize(module, tensors, job=job)
    assert torch.equal(module.tokens.weight, tensors["head.weight"])


# -- engines ---------------------------------------------------------------------------------------


def test_weights_for_a_module_that_has_memory_are_refused() -> None:
    with open_job() as job, pytest.raises(ConfigError, match="has memory already"):
        job.engine(nn.Linear(2, 2), weights={"weight": torch.zeros(2, 2)})


@pytest.mark.parametrize("client", ["none", "optimizer", "callable", "groups"])
def test_an_engine_trains_an_empty_module_like_plain_torch(client: str) -> None:
    plain, module = Net().double(), empty_net().double()
    tensors = {name: t.clone() for name, t in plain.state_dict().items()}
    optimizer: Any = None
    config: dict[str, Any] = SGD
    if client == "optimizer":  # holds parameters that make way for others
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    elif client == "callable":
        optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # noqa: E731
    groups = [{"params": list(module.parameters())}] if client == "groups" else None
    with open_job(**config) as job:
        engine = job.engine(module, optimizer, parameters=groups, weights=tensors)
        reference = torch.optim.SGD(plain.parameters(), lr=0.1)
        for step in range(3):
            x = torch.arange(10).view(2, 5).add(step).remainder(5)
            loss = engine(x.flatten()).square().mean()
            engine.backward(loss)
            engine.step()
            expected = plain(x.flatten()).square().mean()
            reference.zero_grad()
            expected.backward()
            reference.step()
            torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def unlike() -> str:
    with open_job(2, train_batch_size=2) as job, pytest.raises(ConfigError) as raised:
        job.engine(Net() if job.rank else empty_net())
    return str(raised.value)


def test_ranks_of_which_one_has_no_memory_are_told_so() -> None:
    for text in run_distributed(unlike, 2):
        assert 'tokens.weight.device is "meta" on rank 0, "cpu" on rank 1' in text
