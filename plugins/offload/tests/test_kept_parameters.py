"""Parameters that live in files: what is fetched is what a home on the device would have."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from drivetrain_kernels.rules import FusedAdam
from drivetrain_offload.file_io import AsyncFile, FileIOError
from drivetrain_offload.parameters.kept import KeptParameters, UpdateOrder
from drivetrain_offload.parameters.stores import FileStore
from offload_harness import PRECISIONS, adopt, spec_of, states, values

from drivetrain.contracts import BucketSpec, StateHome
from drivetrain.states.device_home import DeviceHome

HOST = torch.device("cpu")
RULE = FusedAdam(lr=1e-2, weight_decay=0.1)
EVERY_PRECISION = pytest.mark.parametrize("precision", PRECISIONS)
"""With masters and without."""


def kept(folder: Path, specs: list[BucketSpec], count: int = 3) -> list[KeptParameters]:
    order = UpdateOrder(count * max(spec.numel * spec.parameter_dtype.itemsize for spec in specs))
    homes = []
    for number, spec in enumerate(specs):
        file = AsyncFile(folder / f"{number}", mode="x")
        file.preallocate(spec.numel * spec.parameter_dtype.itemsize)
        store = FileStore(file, spec.numel, spec.parameter_dtype)
        homes.append(KeptParameters(DeviceHome(spec), store, order, HOST))
    return homes


def specs_of(precision: str, count: int = 3) -> list[BucketSpec]:
    return [
        replace(spec_of(RULE, precision, key=f"b{number}"), released=True)
        for number in range(count)
    ]


def fetched(home: KeptParameters) -> torch.Tensor:
    into = torch.empty(home.spec.numel, dtype=home.spec.parameter_dtype)
    home.fetch(into)
    home.fetched()
    return into


def train(homes: list[StateHome] | list[KeptParameters], steps: int) -> None:
    """Updates of all homes in one order, as model states make them."""
    for step in range(steps):
        gradients = [
            values(home.spec, 100 * step + number, home.spec.gradient_dtype)
            for number, home in enumerate(homes)
        ]
        for home, gradient in zip(homes, gradients, strict=True):
            home.gradient_ready(gradient)
        for home, gradient in zip(homes, gradients, strict=True):
            home.update(gradient, RULE.defaults, 0.5)
        for home in homes:
            home.publish()


@EVERY_PRECISION
def test_training_is_bitwise_that_of_a_home_on_the_device(tmp_path: Path, precision: str) -> None:
    homes, others = kept(tmp_path, specs_of(precision)), []
    for home in homes:
        adopt(home)
        others.append(DeviceHome(home.spec))
    parameters = [adopt(other) for other in others]
    train(homes, 4)
    train(others, 4)
    for home, other, expected in zip(homes, others, parameters, strict=True):
        assert torch.equal(fetched(home), expected)
        home.flush()
        own = states(home)
        shown = {name: own.pop((name, kind)) for name, kind in list(own) if kind == "parameter"}
        for segment in home.spec.segments:
            assert torch.equal(shown[segment.name], segment.of(expected))
        theirs = states(other)
        assert own.keys() == theirs.keys()
        assert all(torch.equal(own[key], theirs[key]) for key in theirs)


@EVERY_PRECISION
def test_three_buckets_at_most_are_in_memory(tmp_path: Path, precision: str) -> None:
    homes = kept(tmp_path, specs_of(precision, count=6))
    for home in homes:
        adopt(home)
    assert not any(near(home) for home in homes)
    most = 0
    update = DeviceHome.update

    def watched(home: DeviceHome, *arguments: object) -> None:
        nonlocal most
        most = max(most, sum(near(other) for other in homes))
        update(home, *arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceHome, "update", watched)
        train(homes, 3)
    assert 1 <= most <= 3
    for home in homes:
        home.flush()
    assert not any(near(home) for home in homes)


def near(home: KeptParameters) -> bool:
    return home._is_near


def test_the_next_bucket_is_read_ahead_also_while_others_are_published(tmp_path: Path) -> None:
    """Without masters an update begins with reading, so that must have begun before."""
    homes = kept(tmp_path, specs_of("fp32", count=4))
    for home in homes:
        adopt(home)
    ahead = []
    for step in range(2):
        for number, home in enumerate(homes):
            ahead.append((step, number, near(home)))
            home.update(values(home.spec, number), RULE.defaults, 1.0)
            home.publish()
            while near(home) and not home.is_written():  # its room is the next but one's
                time.sleep(0.001)
    assert [number for step, number, was_near in ahead if was_near and step == 0] == []
    assert [number for step, number, was_near in ahead if was_near and step == 1] == [1, 2, 3]


@EVERY_PRECISION
def test_what_is_written_from_outside_is_kept(tmp_path: Path, precision: str) -> None:
    (home,) = kept(tmp_path, specs_of(precision, count=1))
    adopt(home)
    train([home], 1)
    new = values(home.spec, 7, home.spec.parameter_dtype)
    home.keep(new)
    assert torch.equal(fetched(home), new)
    segment = home.spec.segments[1]
    for fragment in home.fragments():
        if (fragment.name, fragment.kind) == (segment.name, "parameter"):
            fragment.write(torch.full((segment.numel,), 3.0))
    home.refresh()
    segment.of(new).fill_(3.0)
    assert torch.equal(fetched(home), new)
    if home.spec.has_masters:
        for (name, kind), value in states(home).items():
            part = next(s for s in home.spec.segments if s.name == name)
            assert kind != "master" or torch.equal(value, part.of(new).to(value.dtype))


def test_a_lost_file_is_named(tmp_path: Path) -> None:
    (home,) = kept(tmp_path, specs_of("bf16", count=1))
    adopt(home)
    home._store._file.truncate(5)  # type: ignore[attr-defined]
    with pytest.raises(FileIOError, match=str(tmp_path / "0")):
        fetched(home)


def test_shards_may_be_fetched_while_they_are_read_ahead_and_written_behind(tmp_path: Path) -> None:
    homes = kept(tmp_path, specs_of("fp32", count=4), count=2)
    others = [DeviceHome(home.spec) for home in homes]
    expected = [adopt(other) for other in others]
    for home in homes:
        adopt(home)
    train(homes, 1)
    train(others, 1)
    for _ in range(3):
        for home, values_ in zip(homes, expected, strict=True):
            assert torch.equal(fetched(home), values_)  # the last ones are being written
        homes[0].gradient_ready(values(homes[0].spec, 1))
        assert [near(home) for home in homes] == [True, True, False, False]
        for home, values_ in zip(homes, expected, strict=True):
            assert torch.equal(fetched(home), values_)  # the first ones are being read
        train(homes, 1)
        train(others, 1)


def test_what_a_client_writes_replaces_what_was_read_ahead(tmp_path: Path) -> None:
    (home,) = kept(tmp_path, specs_of("fp32", count=1))
    adopt(home)
    other = DeviceHome(home.spec)
    expected = adopt(other)
    train([home], 1)
    train([other], 1)
    home.gradient_ready(values(home.spec, 1))
    assert near(home)
    new = values(home.spec, 7)
    home.keep(new)
    expected.copy_(new)
    train([home], 1)
    train([other], 1)
    assert torch.equal(fetched(home), expected)
