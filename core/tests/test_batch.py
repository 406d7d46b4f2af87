"""The batch triple in all its cases; every expected number is worked out by hand."""

from __future__ import annotations

import pytest

from drivetrain.contracts import Batch, solve_batch
from drivetrain.errors import ConfigError


@pytest.mark.parametrize(
    ("train", "micro", "steps", "expected"),
    [
        (48, 2, 6, Batch(48, 2, 6, 4)),
        (48, 2, None, Batch(48, 2, 6, 4)),
        (48, None, 6, Batch(48, 2, 6, 4)),
        (None, 2, 6, Batch(48, 2, 6, 4)),
        (48, None, None, Batch(48, 12, 1, 4)),
        (None, 2, None, Batch(8, 2, 1, 4)),
    ],
)
def test_what_is_not_given_is_derived(
    train: int | None, micro: int | None, steps: int | None, expected: Batch
) -> None:
    assert solve_batch(train, micro, steps, 4) == expected


@pytest.mark.parametrize("steps", [None, 4])
def test_accumulation_alone_is_not_enough(steps: int | None) -> None:
    with pytest.raises(ConfigError, match="one of train_batch_size and train_micro_batch_size"):
        solve_batch(None, None, steps, 4)


def test_three_numbers_that_do_not_multiply_are_refused_with_the_arithmetic() -> None:
    with pytest.raises(ConfigError) as caught:
        solve_batch(33, 2, 4, 4, "8 ranks from WORLD_SIZE / tensor_parallel 2")
    assert str(caught.value).startswith(
        "train_batch_size 33 != 2 (train_micro_batch_size_per_gpu) x "
        "4 (gradient_accumulation_steps) x "
        "4 (data shards = 8 ranks from WORLD_SIZE / tensor_parallel 2) = 32"
    )


@pytest.mark.parametrize(
    ("train", "micro", "steps", "message"),
    [
        (33, None, 4, r"33 cannot be divided by 4 \(gradient_accumulation_steps\) x 4 .* = 16"),
        (33, 2, None, r"33 cannot be divided by 2 \(train_micro_batch_size_per_gpu\) x 4 .* = 8"),
        (33, None, None, r"33 cannot be divided by 1 \(gradient_accumulation_steps\) x 4 .* = 4"),
        (33, None, 4, "nearest possible is 32 or 48"),
        (3, 1, None, "nearest possible is 4$"),
    ],
)
def test_a_division_that_leaves_a_remainder_is_refused(
    train: int, micro: int | None, steps: int | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        solve_batch(train, micro, steps, 4)
