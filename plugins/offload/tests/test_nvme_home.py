"""States in files: bit for bit the numbers of the device, in a bounded amount of memory."""

from __future__ import annotations

import random
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_kernels.rules import FusedAdam, FusedLamb, FusedLion, FusedSGD
from drivetrain_offload.file_io import ALIGNMENT
from drivetrain_offload.files import home as nvme_home
from drivetrain_offload.files.tile_layout import TileLayout
from nvme_harness import TILE, files_in, in_files, large_spec
from offload_harness import (
    PRECISIONS,
    adopt,
    assert_same,
    on_device,
    opened,
    spec_of,
    states,
    step,
    values,
)

from drivetrain.contracts import BucketSpec, BucketView, StateSpec, UpdateRule
from drivetrain.optimization.torch_rule import TorchRule
from drivetrain.testing import assert_trains_like_reference

RULES = {
    "torch Adam": lambda: TorchRule(torch.optim.Adam, {"lr": 1e-2}),
    "torch AdamW": lambda: TorchRule(torch.optim.AdamW, {"lr": 1e-2}),
    "torch NAdam": lambda: TorchRule(torch.optim.NAdam, {"lr": 1e-2}),
    "torch SGD": lambda: TorchRule(torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}),
    "Adam": lambda: FusedAdam(lr=1e-2, adam_w_mode=False, weight_decay=0.1),
    "AdamW": lambda: FusedAdam(lr=1e-2, weight_decay=0.1),
    "AdamW, moments in bf16": lambda: FusedAdam(lr=1e-2, state_dtype="bf16"),
    "Lion": lambda: FusedLion(lr=1e-3),
    "SGD": lambda: FusedSGD(lr=0.1, momentum=0.9),
    "SGD without momentum": lambda: FusedSGD(lr=0.1),
    "Lamb": lambda: FusedLamb(lr=1e-2),
}


def run_both(
    folder: Path, specs: list[BucketSpec], steps: int, orders: Any = None, **section: Any
) -> None:
    """Step homes in files and on the device, and compare everything at the end."""
    with opened() as job:
        homes = in_files(job, specs, folder, **section)
        parameters = [adopt(home) for home in homes]
        others, expected = zip(*map(on_device, specs), strict=True)
        for number in range(steps):
            for at in orders(number) if orders else range(len(specs)):
                spec = specs[at]
                gradient = values(spec, 10 + number + at, spec.gradient_dtype)
                hyper = {**spec.rule.defaults, "lr": 1e-2 / (number + 1)}
                for each in (homes[at], others[at]):
                    step(each, gradient, hyper, torch.tensor(0.5))
        for home, own, other, theirs in zip(homes, parameters, others, expected, strict=True):
            home.flush()
            assert_same(home, own, other, theirs)


@pytest.mark.parametrize(("rule", "precision"), list(product(RULES, PRECISIONS)))
def test_ten_steps_give_the_numbers_of_the_device(
    tmp_path: Path, rule: str, precision: str
) -> None:
    made = RULES[rule]()
    specs = [large_spec(made, precision), spec_of(made, precision, key="b1")]
    run_both(tmp_path, specs, steps=10)


@pytest.mark.parametrize("pipeline_read", [True, False])
@pytest.mark.parametrize("pipeline_write", [True, False])
@pytest.mark.parametrize("buffer_count", [2, 3, 16])
def test_buffers_change_the_time_and_not_the_numbers(
    tmp_path: Path, buffer_count: int, pipeline_read: bool, pipeline_write: bool
) -> None:
    specs = [large_spec(FusedAdam(lr=1e-2), key=f"b{number}") for number in range(3)]
    section = {"pipeline_read": pipeline_read, "pipeline_write": pipeline_write}
    run_both(tmp_path, specs, steps=3, buffer_count=buffer_count, **section)


def test_buckets_may_be_updated_in_any_order_and_left_out(tmp_path: Path) -> None:
    specs = [large_spec(FusedAdam(lr=1e-2), key=f"b{number}") for number in range(4)]
    shuffle = random.Random(1)
    run_both(tmp_path, specs, 8, orders=lambda _: shuffle.sample(range(4), shuffle.randint(1, 4)))


class Centred(UpdateRule):
    """Subtracts from every tensor the mean of its gradient, so it has to see tensors whole."""

    grain = "tensor"

    def __init__(self) -> None:
        self.defaults = {"lr": 0.1}
        self.seen: set[tuple[str, int]] = set()

    def states(self, bucket: BucketSpec) -> list[StateSpec]:
        return [StateSpec("last")]

    def update(self, bucket: BucketView, hyper: Any, scale: Any) -> None:
        for segment in bucket.segments:
            self.seen.add((segment.name, segment.numel))
            gradient = segment.of(bucket.gradient).float() * scale
            segment.of(bucket.states["last"]).copy_(gradient)
            segment.of(bucket.weights).sub_(hyper["lr"] * gradient.mean())
        if bucket.out is not None:
            bucket.out.copy_(bucket.weights)


def test_rules_of_whole_tensors_get_them_whole(tmp_path: Path) -> None:
    rule = Centred()
    spec = large_spec(rule, padding=0)
    run_both(tmp_path, [spec], steps=3)
    assert rule.seen == {(segment.name, segment.numel) for segment in spec.segments}


class Counting(UpdateRule):
    """Keeps a number per bucket beside one per element."""

    def __init__(self) -> None:
        self.defaults: dict[str, Any] = {}

    def states(self, bucket: BucketSpec) -> list[StateSpec]:
        return [StateSpec("sum"), StateSpec("updates", torch.int64, numel=2, initial=3)]

    def update(self, bucket: BucketView, hyper: Any, scale: Any) -> None:
        bucket.states["updates"] += 1
        bucket.states["sum"] += bucket.gradient.float() * float(bucket.states["updates"][0])


def test_rules_with_a_state_per_bucket_see_the_bucket_whole(tmp_path: Path) -> None:
    run_both(tmp_path, [large_spec(Counting())], steps=3)


@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_tensors_on_a_device_pass_through_staging(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    elsewhere: set[int] = set()
    spec = large_spec(FusedAdam(lr=1e-2), precision)
    # The device is the host here, taken for a device by the addresses of its tensors.
    monkeypatch.setattr(
        nvme_home, "_is_near", lambda tensor: tensor.untyped_storage().data_ptr() not in elsewhere
    )
    with opened() as job:
        (home,) = in_files(job, [spec], tmp_path)
        home.staging.reserve(4 * TILE, 4 * TILE)
        parameters = adopt(home)
        other, expected = on_device(spec)
        for number in range(3):
            gradient = values(spec, number, spec.gradient_dtype)
            before = gradient.clone()
            elsewhere.update((parameters.data_ptr(), gradient.data_ptr()))
            home.update(gradient, spec.rule.defaults, 0.5)
            assert torch.equal(gradient, before)
            step(other, gradient, spec.rule.defaults, 0.5)
        home.flush()
        assert_same(home, parameters, other, expected)


# -- checkpoints -----------------------------------------------------------------------------------


def test_what_is_written_into_fragments_is_used_and_comes_back(tmp_path: Path) -> None:
    spec = large_spec(FusedAdam(lr=1e-2), padding=0)
    with opened() as job:
        first, second = (in_files(job, [spec], tmp_path)[0] for _ in range(2))
        parameters, others = adopt(first), adopt(second)
        for number in range(3):
            step(first, values(spec, number, torch.bfloat16), spec.rule.defaults)
        step(second, values(spec, 9, torch.bfloat16), spec.rule.defaults)
        first.flush()
        for source, target in zip(first.fragments(), second.fragments(), strict=True):
            target.write(source.read())
        others.copy_(parameters)
        second.step = first.step
        for home in (second, first):  # the second's tiles may have been read ahead
            step(home, values(spec, 5, torch.bfloat16), spec.rule.defaults)
        assert_same(second, others, first, parameters)


def test_fragments_say_where_they_are(tmp_path: Path) -> None:
    with opened() as job:
        (home,) = in_files(job, [large_spec(FusedAdam())], tmp_path)
        adopt(home)
        assert {fragment.home for fragment in home.fragments()} == {"nvme"}


def test_masters_are_made_anew_from_changed_parameters(tmp_path: Path) -> None:
    spec = large_spec(FusedAdam())
    with opened() as job:
        (home,) = in_files(job, [spec], tmp_path)
        parameters = adopt(home)
        step(home, values(spec, 2, torch.bfloat16), spec.rule.defaults)
        parameters.copy_(values(spec, 3))
        home.refresh()
        home.flush()
        masters = {name: value for (name, kind), value in states(home).items() if kind == "master"}
        for segment in spec.segments:
            assert torch.equal(masters[segment.name], segment.of(parameters).float())


# -- files and memory ------------------------------------------------------------------------------


def test_a_bucket_takes_one_file_of_its_states_and_the_job_leaves_none(tmp_path: Path) -> None:
    spec = large_spec(FusedAdam())
    with opened() as job:
        (home,) = in_files(job, [spec], tmp_path)
        adopt(home)
        (file,) = files_in(tmp_path)
        size = file.stat().st_size
        del home  # until here: a file goes with its home
    assert 3 * 4 * spec.numel <= size <= 3 * (4 * spec.numel + ALIGNMENT)
    assert files_in(tmp_path) == []


def test_files_of_homes_that_are_replaced_go_with_them(tmp_path: Path) -> None:
    spec = large_spec(FusedAdam())
    with opened() as job:
        old = in_files(job, [spec], tmp_path)
        parameters = adopt(old[0])
        step(old[0], values(spec, 2, torch.bfloat16), spec.rule.defaults)
        old.clear()
        (new,) = in_files(job, [spec], tmp_path, buffer_size=2 * TILE)
        new.adopt(parameters, parameters.float())
        step(new, values(spec, 2, torch.bfloat16), spec.rule.defaults)
        assert len(files_in(tmp_path)) == 1


def test_tiles_follow_each_other_and_begin_at_whole_pages() -> None:
    spec = large_spec(FusedAdam(), padding=300)
    kinds = {"master": torch.float32, "exp_avg": torch.bfloat16}
    layout = TileLayout.of(spec, kinds, 2 * TILE + 17)
    assert [(tile.start, tile.numel) for tile in layout.tiles] == [
        (0, 8192),
        (8192, spec.numel - 8192),
    ]
    assert layout.tiles[1].offset == 8192 * 4 + 8192 * 2
    assert all(tile.offset % ALIGNMENT == 0 for tile in layout.tiles)
    places = list(layout.places("exp_avg", 8190, 8195))
    second = layout.tiles[1]
    masters = -(-second.numel * 4 // ALIGNMENT) * ALIGNMENT
    assert places == [(8192 * 4 + 8190 * 2, 2), (second.offset + masters, 3)]


MEMORY = """
import sys, torch
from pathlib import Path
from drivetrain_kernels.rules import FusedAdam
from nvme_harness import in_files
from offload_harness import opened, spec_of
from dataclasses import replace
from drivetrain.contracts import Segment

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))

numel, count, tile = 8 << 20, 4, 1 << 16
rule = FusedAdam()
small = spec_of(rule)
spec = replace(small, numel=numel, segments=(Segment("p", (numel,), 0, numel, 0),))
with opened() as job:
    (warm,) = in_files(job, [small], Path(sys.argv[1]))
    warm.adopt(torch.zeros(small.numel, dtype=torch.bfloat16), torch.zeros(small.numel))
    warm.update(torch.zeros(small.numel, dtype=torch.bfloat16), rule.defaults, 1.0)
with opened() as job:
    (home,) = in_files(job, [spec], Path(sys.argv[1]), buffer_size=tile, buffer_count=count)
    parameters = torch.zeros(numel, dtype=torch.bfloat16)
    gradient = torch.ones(numel, dtype=torch.bfloat16)
    home.adopt(parameters, parameters)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    for _ in range(3):
        home.update(gradient, rule.defaults, 1.0)
        home.publish()
    home.flush()
    print(memory("VmHWM") - before, count * tile * 12, home.pipeline.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_memory_is_that_of_the_buffers(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    run = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    grown, buffers, counted = map(int, run.stdout.split())
    assert counted == buffers
    # The states take 100 MB; the buffers were there before, and code is loaded on the way.
    assert grown < 16 << 20


@pytest.mark.parametrize("world", [1, 2])
def test_a_job_trains_like_the_reference(tmp_path: Path, world: int) -> None:
    offload = {"device": "nvme", "nvme_path": str(tmp_path), "buffer_size": TILE}
    config = {
        "train_batch_size": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}},
        "zero_optimization": {"offload_optimizer": offload},
    }
    assert_trains_like_reference(config, world_size=world)
    assert files_in(tmp_path) == []
