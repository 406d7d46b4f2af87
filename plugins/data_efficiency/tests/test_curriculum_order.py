"""Which samples a curriculum deals out, step by step, against a reference in plain Python."""

from __future__ import annotations

import hashlib
import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drivetrain_data_efficiency.sampling.clusters import Clusters
from drivetrain_data_efficiency.sampling.curriculum import CurriculumOrder
from drivetrain_data_efficiency.sampling.permutation import Permutation
from drivetrain_data_efficiency.section import CurriculumLearningSection, DataEfficiencySection
from metric_files import Numbers, write_indexed, write_metric

from drivetrain.contracts import LoaderRequest
from drivetrain.engine.loader import DataLoader
from drivetrain.errors import CheckpointError, ConfigError, TrainingError

LINEAR = {
    "min_difficulty": 2,
    "max_difficulty": 10,
    "schedule_type": "fixed_linear",
    "schedule_config": {"total_curriculum_step": 10, "difficulty_step": 2},
}
SAMPLES = 60
VALUES = [(7 * i) % 10 + 1 for i in range(SAMPLES)]
OTHERS = [(i * i) % 20 + 1 for i in range(SAMPLES)]


def difficulty(step: int, low: int, high: int, last: int, grain: int, degree: float) -> int:
    raw = int((step / last) ** (1 / degree) * (high - low) + low)
    return min(max(raw - raw % grain, low), high)


def digest(*place: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(place).encode()).digest()[:8], "little")


def permuted(size: int, index: int, *place: Any) -> int:
    """One image of the keyed permutation: a Feistel network with whole numbers of Python."""
    half = max(1, -(-(size - 1).bit_length() // 2))
    mask = (1 << half) - 1
    keys = [digest(*place, number) for number in range(6)]
    while True:
        left, right = index >> half, index & mask
        for key in keys:
            word = (right + key) % 2**64
            word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
            word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) % 2**64
            word ^= word >> 31
            left, right = right, left ^ (word & mask)
        index = left << half | right
        if index < size:
            return index


def reference(admitted: list[set[int]], clusters: Any, batch: int, seed: int) -> list[list[int]]:
    """Samples of every step.

    Args:
        admitted: for every step the samples that all metrics have opened.
        clusters: makes the list of a new cluster from the set of its samples.
        batch: samples of a step.
        seed: of the order.
    """
    known: list[list[int]] = []
    dealt: list[int] = []
    seen: set[int] = set()
    steps = []
    for step, opened in enumerate(admitted, start=1):
        if opened - seen:
            known.append(clusters(opened - seen))
            dealt.append(0)
            seen |= opened
        sizes = np.array([len(cluster) for cluster in known])
        generator = np.random.default_rng(digest("step", seed, step))
        counts = generator.multinomial(batch, sizes / sizes.sum())
        taken = []
        for number, (cluster, count) in enumerate(zip(known, counts, strict=True)):
            for place in range(dealt[number], dealt[number] + count):
                run, at = divmod(place, len(cluster))
                where = permuted(len(cluster), at, "cluster", seed, number, run)
                taken.append(cluster[where])
            dealt[number] += int(count)
        steps.append([taken[i] for i in generator.permutation(len(taken))])
    return steps


def curriculum(tmp: Path, **metrics: dict[str, Any]) -> CurriculumLearningSection:
    return CurriculumLearningSection.model_validate(
        {"enabled": True, "data_cluster_path": str(tmp / "c"), "curriculum_metrics": metrics}
    )


def order_of(section: CurriculumLearningSection, batch: int = 8, **keys: Any) -> CurriculumOrder:
    keys = {"num_epochs": 4, "seed": 5, **keys}
    return CurriculumOrder(section, keys.pop("samples", SAMPLES), batch_size=batch, **keys)


def dealt(order: CurriculumOrder, steps: int, batch: int = 8) -> list[list[int]]:
    items = order.items(0, 0)
    return [[next(items)[0] for _ in range(batch)] for _ in range(steps)]


def test_any_part_of_the_permutation_is_that_of_a_network_of_whole_numbers() -> None:
    for size in (1, 2, 3, 5, 64, 65, 1000):
        whole = Permutation(size, "a", 3).part(0, size)
        assert sorted(whole.tolist()) == list(range(size))
        assert whole.tolist() == [permuted(size, i, "a", 3) for i in range(size)]
        assert (
            Permutation(size, "a", 3).part(size // 2, size).tolist() == whole[size // 2 :].tolist()
        )
    assert Permutation(1000, "b").part(0, 9).tolist() != Permutation(1000, "c").part(0, 9).tolist()


def test_every_position_gets_every_number_about_equally_often() -> None:
    counts = np.zeros((8, 8))
    for key in range(4000):
        for place, image in enumerate(Permutation(8, key).part(0, 8)):
            counts[place, image] += 1
    chi_squared = ((counts - 500) ** 2 / 500).sum()
    assert chi_squared < 90  # 49 degrees of freedom: 99.97 %


@pytest.mark.parametrize("degree", [1.0, 2.0])
def test_one_metric_by_value_equals_the_reference(tmp_path: Path, degree: float) -> None:
    files = write_metric(tmp_path, "length", VALUES)
    schedule = {"total_curriculum_step": 10, "difficulty_step": 2}
    if degree != 1.0:
        schedule["root_degree"] = 2
    kind = "fixed_linear" if degree == 1.0 else "fixed_root"
    metric = {**LINEAR, **files, "schedule_type": kind, "schedule_config": schedule}
    section = curriculum(tmp_path, length=metric)
    admitted = [
        {i for i, v in enumerate(VALUES) if v <= difficulty(step, 2, 10, 10, 2, degree)}
        for step in range(1, 26)
    ]

    def ranked(new: set[int]) -> list[int]:
        return sorted(new, key=lambda i: (VALUES[i], i))

    assert dealt(order_of(section), 25) == reference(admitted, ranked, 8, 5)


def test_percentiles_open_that_share_of_the_samples(tmp_path: Path) -> None:
    files = write_metric(tmp_path, "rarity", OTHERS)
    del files["index_to_metric_path"]
    schedule = {"difficulty": [10, 25, 40], "max_step": [3, 6]}
    metric = {
        "difficulty_type": "percentile",
        "min_difficulty": 10,
        "max_difficulty": 40,
        "schedule_type": "fixed_discrete",
        "schedule_config": schedule,
        **files,
    }
    ranked = sorted(range(SAMPLES), key=lambda i: (OTHERS[i], i))
    share = SAMPLES // 40
    stages = [10] * 3 + [25] * 3 + [40] * 6
    admitted = [set(ranked[: SAMPLES if d == 40 else d * share]) for d in stages]
    expected = reference(admitted, lambda new: [i for i in ranked if i in new], 8, 5)
    assert dealt(order_of(curriculum(tmp_path, rarity=metric)), 12) == expected


def test_several_metrics_open_what_all_of_them_have_opened(tmp_path: Path) -> None:
    length = {**LINEAR, **write_metric(tmp_path, "length", VALUES)}
    percent = write_metric(tmp_path, "rarity", OTHERS)
    rarity = {
        **LINEAR,
        **percent,
        "difficulty_type": "percentile",
        "min_difficulty": 40,
        "max_difficulty": 100,
    }
    loud = {**LINEAR, "clustering_type": "single_cluster"}
    section = curriculum(tmp_path, length=length, rarity=rarity, loud=loud)
    ranked = sorted(range(SAMPLES), key=lambda i: (OTHERS[i], i))

    def by_percent(step: int) -> set[int]:
        percentile = difficulty(step, 40, 100, 10, 2, 1.0)
        return set(ranked[: SAMPLES if percentile == 100 else percentile * (SAMPLES // 100)])

    # 60 samples have no whole share of a percent, so the last percentile opens all.
    admitted = [
        {i for i, v in enumerate(VALUES) if v <= difficulty(step, 2, 10, 10, 2, 1.0)}
        & by_percent(step)
        for step in range(1, 16)
    ]
    assert not admitted[0]
    with pytest.raises(ConfigError, match="no sample is as easy as min_difficulty 40"):
        order_of(section)
    length["min_difficulty"] = 4
    values = {**LINEAR, **percent, "min_difficulty": 6, "max_difficulty": 20}
    section = curriculum(tmp_path, length=length, rarity=values, loud=loud)
    admitted = [
        {
            i
            for i in range(SAMPLES)
            if VALUES[i] <= difficulty(step, 4, 10, 10, 2, 1.0)
            and OTHERS[i] <= difficulty(step, 6, 20, 10, 2, 1.0)
        }
        for step in range(1, 16)
    ]
    order = order_of(section)
    steps = dealt(order, 15)
    for number, (samples, opened) in enumerate(zip(steps, admitted, strict=True)):
        assert set(samples) <= opened, number
    again = order_of(section)  # from the files
    assert dealt(again, 15) == steps
    assert {c for cluster in order._clusters.clusters for c in cluster._samples} == admitted[-1]
    sizes = [len(new) for new in _arrivals(admitted)]
    assert order._clusters.sizes().tolist() == sizes


def _arrivals(admitted: list[set[int]]) -> list[set[int]]:
    seen: set[int] = set()
    found = []
    for opened in admitted:
        if opened - seen:
            found.append(opened - seen)
            seen |= opened
    return found


def test_without_a_metric_that_opens_samples_all_come_in_at_once(tmp_path: Path) -> None:
    section = curriculum(tmp_path, seqlen={**LINEAR, "clustering_type": "single_cluster"})
    expected = reference([set(range(SAMPLES))] * 9, sorted, 8, 5)
    order = order_of(section)
    assert dealt(order, 9) == expected
    whole = order._clusters.clusters[0].take(0, 2 * SAMPLES).tolist()
    assert sorted(whole[:SAMPLES]) == sorted(whole[SAMPLES:]) == list(range(SAMPLES))
    assert whole[:SAMPLES] != whole[SAMPLES:]


def test_a_cluster_that_runs_out_begins_again_in_another_order(tmp_path: Path) -> None:
    values = [1, 1, 1] + [10] * 57
    schedule = {"difficulty": [1, 10], "max_step": [4]}
    metric = {
        "min_difficulty": 1,
        "max_difficulty": 10,
        "schedule_type": "fixed_discrete",
        "schedule_config": schedule,
        **write_metric(tmp_path, "m", values),
    }
    steps = dealt(order_of(curriculum(tmp_path, m=metric)), 4)
    taken = [sample for step in steps for sample in step]
    assert {sample: taken.count(sample) for sample in (0, 1, 2)} == {0: 11, 1: 11, 2: 10} or all(
        10 <= taken.count(sample) <= 11 for sample in (0, 1, 2)
    )


def micro_batches(order: CurriculumOrder, micro: int, shards: int, rounds: int, state: Any) -> Any:
    """Samples by round, of all shards, and the state after them; also with workers."""
    loaders = [
        DataLoader(
            LoaderRequest(
                Numbers(SAMPLES), micro, shard=shard, num_shards=shards, order=order, seed=1
            )
        )
        for shard in range(shards)
    ]
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(state)
    passes = [iter(loader) for loader in loaders]
    found = []
    for _ in range(rounds):
        found += [int(row[0]) for one in passes for row in next(one)]
    states = [loader.state_dict() for loader in loaders]
    assert all(other == states[0] for other in states)
    return found, states[0]


def test_the_order_is_the_same_on_any_number_of_ranks_and_after_any_resume(tmp_path: Path) -> None:
    metric = {**LINEAR, **write_metric(tmp_path, "length", VALUES)}
    section = curriculum(tmp_path, length=metric)
    whole = [sample for step in dealt(order_of(section), 30) for sample in step]
    for micro, shards in ((8, 1), (2, 2), (1, 4), (4, 2)):
        found, _ = micro_batches(order_of(section), micro, shards, 240 // (micro * shards), None)
        assert found == whole
    for stop in (1, 5, 24, 119):
        first, state = micro_batches(order_of(section), 1, 2, stop, None)
        rest, _ = micro_batches(order_of(section), 2, 1, 120 - stop, state)
        assert first + rest == whole
    # a second checkpoint after a resume, on yet another number of ranks
    first, state = micro_batches(order_of(section), 1, 2, 40, None)
    second, state = micro_batches(order_of(section), 2, 4, 10, state)
    rest, _ = micro_batches(order_of(section), 1, 1, 80, state)
    assert first + second + rest == whole


def test_passes_go_on_in_the_curriculum_and_have_their_length(tmp_path: Path) -> None:
    metric = {**LINEAR, **write_metric(tmp_path, "length", VALUES)}
    order = order_of(curriculum(tmp_path, length=metric), batch=7, num_epochs=1)
    loader = DataLoader(LoaderRequest(Numbers(SAMPLES), 7, order=order))
    first, second = list(loader), list(loader)
    assert len(loader) == len(first) == len(second) == 9
    assert order.step_at(1, 0) == (10, 0)
    assert max(VALUES[int(row[0])] for row in second[0]) > 8  # step 10 has opened all
    fresh = order_of(curriculum(tmp_path, length=metric), batch=7, num_epochs=1)
    fresh.load_state_dict(order.state_dict(1, 14))
    assert [i for (i,) in fresh.items(1, 14)] == [i for (i,) in order.items(1, 14)]
    assert fresh.step_at(2, 0) == order.step_at(2, 0)


def test_a_position_of_long_ago_is_refused_and_one_of_another_seed_too(tmp_path: Path) -> None:
    section = curriculum(tmp_path, length={**LINEAR, **write_metric(tmp_path, "m", VALUES)})
    state = order_of(section).state_dict(0, 80)
    later = order_of(section)
    later.load_state_dict(state)
    with pytest.raises(CheckpointError, match="cannot go back to step 2"):
        next(iter(later.items(0, 16)))
    with pytest.raises(CheckpointError, match="seed 5, and this one has 6"):
        order_of(section, seed=6).load_state_dict(state)
    with pytest.raises(CheckpointError, match="had no curriculum"):
        order_of(section).load_state_dict(None)


def test_files_of_another_data_set_and_difficulties_that_open_nothing_are_refused(
    tmp_path: Path,
) -> None:
    files = write_metric(tmp_path, "length", VALUES)
    with pytest.raises(ConfigError, match="lists 60 samples, but the data set has 61"):
        order_of(curriculum(tmp_path, length={**LINEAR, **files}), samples=61)
    hard = write_metric(tmp_path, "hard", [v + 5 for v in VALUES])
    with pytest.raises(ConfigError, match=r"of the metric hard; the smallest value is 6"):
        order_of(curriculum(tmp_path, hard={**LINEAR, **hard}))
    merged = write_indexed(tmp_path / "merged", [list(range(SAMPLES))], "i", 4)
    with pytest.raises(ConfigError, match="must be the one that is not merged"):
        order_of(curriculum(tmp_path, m={**LINEAR, **files, "index_to_sample_path": merged}))
    with pytest.raises(ConfigError, match="is no indexed data set"):
        order_of(curriculum(tmp_path, m={**LINEAR, **files, "index_to_sample_path": "/nowhere"}))


def test_a_data_set_shorter_than_a_batch_is_refused(tmp_path: Path) -> None:
    section = curriculum(tmp_path, length={**LINEAR, **write_metric(tmp_path, "m", VALUES)})
    order_of(section, batch=SAMPLES)
    with pytest.raises(ConfigError, match="has 60 samples, fewer than a global batch of 61"):
        order_of(section, batch=SAMPLES + 1)


def test_difficulties_never_fall_below_the_first(tmp_path: Path) -> None:
    """Rounding down to a multiple of ``difficulty_step`` would give 0 at first."""
    metric = {**LINEAR, "min_difficulty": 3, **write_metric(tmp_path, "m", VALUES)}
    metric["schedule_config"] = {"total_curriculum_step": 10, "difficulty_step": 5}
    order = order_of(curriculum(tmp_path, m=metric))
    found = [order.difficulties(step)["m"] for step in range(1, 12)]
    assert found == [3, 3, 5, 5, 5, 5, 5, 5, 5, 10, 10]
    first = [sample for (sample,) in itertools.islice(order.items(0, 0), 8)]
    assert all(VALUES[sample] <= 3 for sample in first)


def test_a_custom_schedule_is_a_function_within_the_bounds(tmp_path: Path) -> None:
    metric = {**LINEAR, **write_metric(tmp_path, "m", VALUES)}
    metric |= {"schedule_type": "custom", "schedule_config": {}}
    order = order_of(curriculum(tmp_path, m=metric))
    with pytest.raises(ConfigError, match="set_custom_curriculum_learning_schedule"):
        next(order.items(0, 0))
    with pytest.raises(ConfigError, match=r"no metric 'x' has a custom schedule; .* m"):
        order.set_schedules({"x": lambda step: 2})
    order.set_schedules({"m": lambda step: min(2 * step, 10)})
    assert order.difficulties(3) == {"m": 6}
    order.set_schedules({"m": lambda step: 11})
    with pytest.raises(TrainingError, match=r"returned 11 for step 1; .* from min_difficulty 2"):
        next(order.items(0, 0))


def test_switches_above_a_leaf_really_switch_and_must_be_said(tmp_path: Path) -> None:
    leaf = {
        "enabled": True,
        "curriculum_metrics": {"seqlen": {**LINEAR, "clustering_type": "single_cluster"}},
    }

    def section(top: dict[str, Any], middle: dict[str, Any]) -> DataEfficiencySection:
        sampling = {**middle, "curriculum_learning": leaf}
        return DataEfficiencySection.model_validate({**top, "data_sampling": sampling})

    on, off = {"enabled": True}, {"enabled": False}
    assert section(on, on).curriculum is not None
    assert section(off, on).curriculum is None
    assert section(on, off).curriculum is None
    with pytest.raises(ValueError, match=r"data_efficiency.data_sampling.enabled is not set"):
        section(on, {})
    with pytest.raises(ValueError, match=r"data_efficiency.enabled is not set"):
        section({}, on)


def test_a_hundred_million_samples_start_in_a_moment(tmp_path: Path) -> None:
    """The files are sparse: 100 million samples in two rows, nothing of them is read or written."""
    total = 100_000_000
    head = (tmp_path / "s.idx", tmp_path / "v.idx")
    write_indexed(tmp_path / "s", [[]], "i", 4)
    write_indexed(tmp_path / "v", [[1], [2]], "q", 5)
    import struct

    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 2, 1)
    index += struct.pack("<2i2qq", total // 2, total // 2, 0, 2 * total, 0)
    head[0].write_bytes(index)
    with (tmp_path / "s.bin").open("wb") as file:
        file.truncate(4 * total)
    metric = {
        "index_to_sample_path": str(tmp_path / "s"),
        "min_difficulty": 1,
        "max_difficulty": 2,
        "index_to_metric_path": str(tmp_path / "v"),
        "schedule_type": "fixed_discrete",
        "schedule_config": {"difficulty": [1, 2], "max_step": [2]},
    }
    begin = time.perf_counter()
    order = order_of(curriculum(tmp_path, m=metric), samples=total)
    order.load_state_dict(order.state_dict(0, 8 * 1000))
    next(order.items(0, 8 * 1000))
    assert len(order._clusters.clusters) == 2
    assert time.perf_counter() - begin < 60  # the figure is a benchmark's


def test_a_clusters_file_is_not_taken_for_that_of_other_files(tmp_path: Path) -> None:
    first = curriculum(
        tmp_path,
        a={**LINEAR, **write_metric(tmp_path, "a", VALUES), "min_difficulty": 8},
        b={**LINEAR, **write_metric(tmp_path, "b", VALUES[::-1]), "min_difficulty": 8},
    )
    clusters = Clusters(first.curriculum_metrics, SAMPLES, str(tmp_path / "c"), 1)
    clusters.open({"a": 8, "b": 8})
    again = Clusters(first.curriculum_metrics, SAMPLES, str(tmp_path / "c"), 1)
    again.open({"a": 8, "b": 8})
    assert len(list((tmp_path / "c").glob("*.npy"))) == 1
    write_metric(tmp_path, "b", VALUES[1:] + VALUES[:1])
    other = Clusters(first.curriculum_metrics, SAMPLES, str(tmp_path / "c"), 1)
    other.open({"a": 8, "b": 8})
    assert len(list((tmp_path / "c").glob("*.npy"))) == 2
