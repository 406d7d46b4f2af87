"""DeepSpeed's names of its data pipeline, as scripts use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drivetrain_data_efficiency import CurriculumOrder
from drivetrain_data_efficiency.deepspeed import analyzer, indexed, routing, sampler, scheduling
from drivetrain_data_efficiency.section import DataEfficiencySection
from metric_files import Numbers, write_metric
from pydantic import ValidationError
from torch import nn

from drivetrain.errors import CheckpointError, ConfigError

LINEAR = {
    "min_difficulty": 2,
    "max_difficulty": 10,
    "schedule_type": "fixed_linear",
    "schedule_config": {"total_curriculum_step": 10, "difficulty_step": 2},
}


def test_difficulties_are_those_of_the_formula() -> None:
    scheduler = scheduling.CurriculumScheduler(LINEAR)
    assert scheduler.get_current_difficulty() == 2
    found = {step: scheduler.update_difficulty(step) for step in (1, 5, 9, 10)}
    assert found == {1: 2, 5: 6, 9: 8, 10: 10}
    stages = {"difficulty": [1, 2, 3, 4, 5], "max_step": [2, 4, 6, 8]}
    discrete = {**LINEAR, "min_difficulty": 1, "max_difficulty": 5}
    discrete |= {"schedule_type": "fixed_discrete", "schedule_config": stages}
    scheduler = scheduling.CurriculumScheduler(discrete)
    assert [scheduler.update_difficulty(s) for s in range(1, 10)] == [1, 1, 2, 2, 3, 3, 4, 4, 5]
    other = scheduling.CurriculumScheduler(discrete)
    other.set_state(scheduler.get_state())
    assert other.get_current_difficulty() == 5


def test_layer_tokens_are_those_of_the_formula() -> None:
    config = {
        "total_layer_num": 12,
        "random_ltd_layer_num": 10,
        "global_batch_size": 4,
        "random_ltd_schedule": {
            "min_value": 128,
            "max_value": 256,
            "schedule_type": "fixed_linear",
            "schedule_config": {"require_steps": 10, "seq_per_step": 16},
        },
    }
    scheduler = scheduling.RandomLTDScheduler(config)
    expected, consumed = [], 0
    for step in range(12):
        raw = int(step / 10 * 128 + 128)
        expected.append(min(raw - raw % 16, 256))
        consumed += 4 * (expected[-1] * 10 + 256 * 2)
    assert [scheduler.update_seq(step) for step in range(12)] == expected
    assert scheduler.state_dict()["consumed_layer_tokens"] == consumed
    assert scheduler.get_total_layer_tokens(12) == consumed
    other = scheduling.RandomLTDScheduler(config)
    other.load_state_dict(scheduler.state_dict())
    assert other.state_dict() == scheduler.state_dict()


def test_batches_by_length_hold_every_sample_the_last_included() -> None:
    lengths = np.random.default_rng(0).integers(1, 20, 100).tolist()
    found, sizes, longest = scheduling.batch_by_seqlens(lengths, 40, effective_batch_size=1)
    samples = [sample for _, own in found for sample in own]
    assert samples == list(range(100))
    assert sizes == [len(own) for _, own in found]
    assert longest == [max(lengths[s] for s in own) for _, own in found]
    assert all(sum(lengths[s] for s in own) <= 40 for _, own in found)
    found, sizes, _ = scheduling.batch_by_seqlens(lengths, 40, effective_batch_size=4)
    assert [batch for batch, _ in found] == [i // 4 for i in range(len(found))]
    assert sum(sizes) == sum(len(own) for _, own in found)
    with pytest.raises(ConfigError, match="less than one batch of 99"):
        scheduling.batch_by_seqlens(lengths, 40, effective_batch_size=99)
    with pytest.raises(ConfigError, match="equal numbers of samples"):
        scheduling.batch_by_seqlens(lengths, 40, required_microbatches_of_same_size=True)


def test_rates_scale_as_named() -> None:
    assert scheduling.scale_lr(8, 32, 0.1) == pytest.approx(0.4)
    assert scheduling.scale_lr(8, 32, 0.1, "sqrt") == pytest.approx(0.2)
    assert scheduling.scale_lr(8, 32, 0.1, "none") == 0.1
    with pytest.raises(ValueError, match="unknown scaling method 'cubic'"):
        scheduling.scale_lr(8, 32, 0.1, "cubic")


@pytest.mark.parametrize("threads", [1, 2])
def test_an_analysis_by_deepspeeds_arguments_writes_its_files(tmp_path: Path, threads: int) -> None:
    arguments: dict[str, Any] = {
        "num_threads": threads,
        "batch_size": 4,
        "metric_names": ["last", "total"],
        "metric_functions": [lambda b: b[:, -1] % 5, lambda b: b.sum(0)],
        "metric_types": ["single_value_per_sample", "accumulate_value_over_samples"],
        "metric_dtypes": [torch.int64, torch.int64],
        "save_path": str(tmp_path),
    }
    found = analyzer.DataAnalyzer(Numbers(40), **arguments)
    found.run_map()
    found.run_reduce()
    rows = indexed.make_dataset(str(tmp_path / "last" / "last_index_to_sample"))
    assert [row.tolist() for row in rows] == [
        [i for i in range(40) if (i + 7) % 5 == value] for value in range(5)
    ]
    total = indexed.MMapIndexedDataset(str(tmp_path / "total" / "total_metric_value"), True)
    assert total[0].tolist() == [sum(range(k, 40 + k)) for k in range(8)]
    arguments |= {"save_path": str(tmp_path / "b"), "metric_dtypes": [torch.int32, torch.int64]}
    with pytest.raises(Exception, match="is int64, and int32 was said"):
        analyzer.DataAnalyzer(Numbers(40), **arguments).run_map_reduce()
    for wrong, message in (
        ({"metric_types": ["mean", "mean"]}, "metric type 'mean' is none of"),
        ({"metric_names": ["one"]}, "1 metric_names, 2 metric_functions"),
        ({"custom_reduce": print}, "custom_reduce is not supported"),
    ):
        with pytest.raises(ConfigError, match=message):
            analyzer.DataAnalyzer(Numbers(40), **{**arguments, **wrong})


def test_builders_and_files_have_their_names(tmp_path: Path) -> None:
    prefix = str(tmp_path / "data")
    builder = indexed.create_mmap_dataset_builder(prefix, indexed.find_fit_int_dtype(0, 300))
    builder.add_item(torch.tensor([1, 300]))
    indexed.close_mmap_dataset_builder(builder, prefix)
    assert indexed.dataset_exists(prefix)
    assert indexed.infer_dataset_impl(prefix) == "mmap"
    assert indexed.infer_dataset_impl(str(tmp_path / "none")) is None
    found = indexed.make_dataset(prefix, "mmap", skip_warmup=True)
    assert found[0].tolist() == [1, 300]
    assert found.dtype == np.uint16
    assert indexed.make_builder(indexed.data_file_path(prefix + "2"), vocab_size=100)._code == 6
    with pytest.raises(ConfigError, match="'lazy' of indexed data sets is not read"):
        indexed.make_dataset(prefix, "lazy")


def test_layers_are_chosen_by_class_and_names_stay() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert routing.convert_to_random_ltd(model, nn.Linear) is model
    assert routing.save_without_random_ltd(model).keys() == {"0.weight", "0.bias"}
    theirs = {"layers.3.random_ltd_layer.weight": 1, "head.bias": 2}
    assert routing.remove_random_ltd_state_dict(theirs) == {"layers.3.weight": 1, "head.bias": 2}


def sampler_config(folder: Path) -> dict[str, Any]:
    metric = {**LINEAR, **write_metric(folder, "m", [i % 10 + 1 for i in range(40)])}
    learning = {"enabled": True, "curriculum_metrics": {"m": metric}}
    sampling = {"enabled": True, "num_epochs": 2, "curriculum_learning": learning}
    return {"enabled": True, "seed": 3, "data_sampling": sampling}


def test_the_sampler_gives_ranks_their_parts_of_the_curriculums_order(tmp_path: Path) -> None:
    config = sampler_config(tmp_path)
    section = DataEfficiencySection.model_validate(config).curriculum
    assert section is not None
    order = CurriculumOrder(section, 40, batch_size=12, num_epochs=2, seed=3)
    expected = [sample for (sample,) in order.items(0, 0)]

    def samplers(ranks: int, micro: int, steps: int, **keys: Any) -> list[Any]:
        made = sampler.DeepSpeedDataSampler
        return [made(config, 40, micro, r, ranks, None, steps, r, **keys) for r in range(ranks)]

    found: list[int] = []
    first = samplers(2, 3, 2)
    for batches in list(zip(*first, strict=True))[:5]:
        found += [sample for batch in batches for sample in batch]
    assert found == expected[:30]
    assert len(first[0]) == 80
    assert first[0].consumed_samples == 78  # of 80, the last two fill no round

    one, other = samplers(2, 3, 2)[0], samplers(3, 2, 2)
    iterator = iter(one)
    for _ in range(5):
        next(iterator)
    assert one.curriculum_step == 3
    assert one.current_difficulties == {"m": order.difficulties(3)["m"]}
    for each in other:
        each.load_state_dict(one.state_dict())
    rest = [sample for batches in zip(*other, strict=True) for batch in batches for sample in batch]
    assert rest == expected[30:78]
    last = [len(list(each)[-1]) for each in samplers(2, 3, 2, drop_last=False)]
    assert last == [1, 1]


def test_a_sampler_without_a_curriculum_or_with_deepspeeds_state_is_refused(tmp_path: Path) -> None:
    config = sampler_config(tmp_path)
    with pytest.raises(CheckpointError, match="the sampler's state is one of DeepSpeed"):
        sampler.DeepSpeedDataSampler(config, 40, 4, 0, 1).load_state_dict({"np_rng_state": None})
    with pytest.raises(ConfigError, match="there is no rank 2 of 2"):
        sampler.DeepSpeedDataSampler(config, 40, 4, 2, 2)
    config["data_sampling"]["enabled"] = False
    with pytest.raises(ConfigError, match="the section has none enabled"):
        sampler.DeepSpeedDataSampler(config, 40, 4, 0, 1)


def test_samples_are_cut_into_parts_of_one_size() -> None:
    assert scheduling.split_index(2, 12, 4) == [(2, 5), (5, 8), (8, 10), (10, 12)]
    workers, threads = scheduling.split_dataset(range(7), 2, 1, 3)
    assert workers == [(0, 4), (4, 7)]
    assert threads == [(4, 5), (5, 6), (6, 7)]


def test_a_schedule_of_kept_tokens_may_be_a_scripts_own() -> None:
    class Own(scheduling.BaseScheduler):
        def __init__(self) -> None:
            super().__init__()
            config = {"require_steps": 4, "seq_per_step": 8}
            self.state = {"min_value": 16, "max_value": 48, "schedule_config": config, "other": 1}

    assert [Own().get_value(step) for step in (0, 1, 2, 4, 9)] == [16, 24, 32, 48, 48]
    with pytest.raises(ValidationError, match="min_value"):
        scheduling.BaseScheduler().get_value(0)


def test_the_section_is_checked_and_whole() -> None:
    found = scheduling.get_data_efficiency_config({"data_efficiency": {"enabled": True}})
    assert found["enabled"] is True
    assert found["data_routing"]["random_ltd"]["enabled"] is False
    with pytest.raises(ValidationError, match="sampling"):
        scheduling.get_data_efficiency_config({"data_efficiency": {"sampling": {}}})


def test_layers_that_a_script_wraps_keep_their_names_in_saved_weights() -> None:
    layer = nn.Linear(4, 4)
    wrapped = nn.Sequential(routing.RandomLayerTokenDrop(layer))
    inputs = torch.ones(1, 2, 4)
    assert torch.equal(wrapped(inputs), layer(inputs))
    assert set(wrapped.state_dict()) == {"0.random_ltd_layer.weight", "0.random_ltd_layer.bias"}
    assert set(routing.save_without_random_ltd(wrapped)) == {"0.weight", "0.bias"}
