"""The arithmetic of elastic batches: published vectors, and an exhaustive search beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from drivetrain_elasticity import ElasticitySection, compute_elastic_config, solve, valid_sizes
from drivetrain_elasticity.batches import highly_composite
from drivetrain_elasticity.command import elastic

from drivetrain.errors import ConfigError


def section(**keys: Any) -> ElasticitySection:
    return ElasticitySection.model_validate({"enabled": True, **keys})


@pytest.mark.parametrize(
    ("keys", "batch", "count", "first", "last"),
    [
        (
            {
                "micro_batch_sizes": [8, 12, 16, 17],
                "max_train_batch_size": 10000,
                "min_gpus": 32,
                "max_gpus": 1500,
            },
            *(9792, 23, 32, 1224),
        ),
        ({"micro_batch_sizes": [2, 4, 6], "max_train_batch_size": 2000}, *(1680, 32, 1, 840)),
        ({"micro_batch_sizes": [1, 2, 3], "max_train_batch_size": 12}, *(12, 6, 1, 12)),
    ],
)
def test_known_results_of_version_1(
    keys: dict[str, Any], batch: int, count: int, first: int, last: int
) -> None:
    found = solve(section(version=0.1, **keys))
    assert found.train_batch_size == batch
    assert (len(found.sizes), found.sizes[0], found.sizes[-1]) == (count, first, last)


def test_a_known_result_of_version_2() -> None:
    keys = {"micro_batch_sizes": [8, 12, 16, 17], "max_train_batch_size": 10000}
    found = solve(section(**keys, min_gpus=32, max_gpus=1500, num_gpus_per_node=8))
    assert (found.train_batch_size, len(found.sizes)) == (7680, 15)
    assert all(size % 8 == 0 for size in found.sizes)


def test_sizes_that_fit_are_those_that_an_exhaustive_search_finds() -> None:
    for batch in (12, 60, 1680, 9792):
        for micro in ((1, 2, 3), (2, 4, 6), (8, 12, 16, 17)):
            expected = [n for n in range(1, 501) if any(batch % (m * n) == 0 for m in micro)]
            assert valid_sizes(batch, micro, 1, 500) == expected


def test_highly_composite_numbers_have_more_divisors_than_all_before_them() -> None:
    def divisors(number: int) -> int:
        return sum(number % d == 0 for d in range(1, number + 1))

    best, expected = 0, []
    for number in range(1, 2600):
        if (count := divisors(number)) > best:
            best = count
            expected.append(number)
    assert highly_composite(2599) == expected
    assert (len(highly_composite()), highly_composite()[-1]) == (38, 720_720)


def test_a_tie_goes_to_the_larger_or_to_the_smaller_batch() -> None:
    keys = {"micro_batch_sizes": [2, 3], "max_train_batch_size": 10, "max_gpus": 2, "version": 0.1}
    assert solve(section(**keys)).train_batch_size == 8
    assert solve(section(**keys, prefer_larger_batch=False)).train_batch_size == 6


@pytest.mark.parametrize("ranks", [1, 4, 8, 30, 840])
def test_the_micro_batch_is_the_largest_that_shares_out_the_batch(ranks: int) -> None:
    found = solve(section(version=0.1, micro_batch_sizes=[2, 4, 6]), ranks)
    each = found.train_batch_size // ranks
    assert found.micro_batch_size == max(m for m in (2, 4, 6) if each % m == 0)


def test_ranks_that_do_not_fit_are_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match=r"over 11 data shards .* that fit: 7, 8, 10, 12, 14, 15"):
        solve(section(version=0.1, micro_batch_sizes=[2, 4, 6]), 11)


def test_version_2_finds_a_batch_for_ranks_that_do_not_fit_the_elastic_one() -> None:
    found = solve(section(micro_batch_sizes=[2, 4], max_train_batch_size=100), 11)
    assert (found.train_batch_size, found.sizes, found.micro_batch_size) == (88, (11,), 4)
    with pytest.raises(ConfigError, match="the smallest is 2 x 60 = 120"):
        solve(section(micro_batch_sizes=[2, 4], max_train_batch_size=100), 60)


def test_ranks_that_share_a_model_count_once() -> None:
    keys = {"micro_batch_sizes": [2, 4, 6], "num_gpus_per_node": 8, "model_parallel_size": 2}
    found = solve(section(**keys), 16)
    assert 8 in found.sizes
    assert found.train_batch_size % (8 * (found.micro_batch_size or 0)) == 0
    with pytest.raises(ConfigError, match="15 ranks cannot be divided by model_parallel_size 2"):
        solve(section(**keys), 15)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"min_gpus": 8, "max_gpus": 4}, "min_gpus 8 is more than max_gpus 4"),
        ({"max_train_batch_size": 1}, "less than the smallest of micro_batch_sizes, 2"),
        ({"micro_batch_sizes": [0]}, "micro_batch_sizes.0: "),
        ({"micro_batch_sizes": []}, "micro_batch_sizes: "),
        ({"version": 0.3}, "version 0.3 is not known"),
        ({"version": 0.1, "model_parallel_size": 2}, "model_parallel_size needs version 0.2"),
        ({"num_gpus_per_node": 8, "model_parallel_size": 3}, "no multiple of model_parallel_size"),
        ({"min_gpus": 5000}, "fits any number of ranks from 5000 to 10000"),
    ],
)
def test_sections_that_make_no_sense_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compute_elastic_config({"elasticity": keys})
    assert message in str(caught.value)


def test_the_config_of_a_number_of_ranks_has_a_micro_batch() -> None:
    keys = {"enabled": True, "max_train_batch_size": 16, "micro_batch_sizes": [2, 4]}
    config = {"elasticity": {**keys, "min_gpus": 1, "max_gpus": 4, "version": 0.1}}
    batch, sizes = compute_elastic_config(config, "0.19.8")
    assert compute_elastic_config(config, return_microbatch=True) == (batch, sizes, None)
    found = compute_elastic_config(config, target_deepspeed_version="0.19.8", world_size=2)
    assert found == (batch, sizes, 4)


def test_the_command_shows_what_fits(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    keys = {"micro_batch_sizes": [1, 2, 3], "max_train_batch_size": 12, "version": 0.1}
    path.write_text(json.dumps({"elasticity": keys}), "utf-8")
    result = CliRunner().invoke(elastic, [str(path), "-w", "4"], catch_exceptions=False)
    assert result.output.splitlines() == [
        "global batch: 12",
        "numbers of ranks (6): 1, 2, 3, 4, 6, 12",
        "with 4 ranks: micro-batch 3",
    ]
