"""The batch triple: global batch = micro-batch x accumulation steps x data shards."""

from __future__ import annotations

from dataclasses import dataclass

from drivetrain.errors import ConfigError

GLOBAL = "train_batch_size"
MICRO = "train_micro_batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps"

LARGEST = 2**31 - 1
"""No job sees more samples in a step; a larger number is a slip of the keyboard."""


@dataclass(frozen=True)
class Batch:
    """How many samples each part of a step sees.

    Args:
        train_batch_size: samples of one optimizer step over all ranks.
        micro_batch_size: samples of one forward on one data shard.
        accumulation_steps: micro-batches between two optimizer steps.
        data_shards: data-parallel size, by which the global batch is split.
    """

    train_batch_size: int
    micro_batch_size: int
    accumulation_steps: int
    data_shards: int

    def __post_init__(self) -> None:
        product = self.micro_batch_size * self.accumulation_steps * self.data_shards
        assert product == self.train_batch_size, f"{self} does not multiply"


def solve_batch(
    train: int | None,
    micro: int | None,
    accumulation: int | None,
    data_shards: int,
    shards_origin: str = "",
) -> Batch:
    """Complete the triple from what is given; every given value is positive.

    ====================  =================================================
    given                 derived
    ====================  =================================================
    all three             nothing; they must multiply
    two of them           the third
    global batch only     accumulation 1, micro-batch = global / shards
    micro-batch only      accumulation 1, global = micro-batch x shards
    ====================  =================================================

    Args:
        train: global batch size in samples, or ``None``.
        micro: micro-batch size in samples, or ``None``.
        accumulation: accumulation steps, or ``None``.
        data_shards: number of data shards.
        shards_origin: how that number came about, e.g. ``"8 ranks from WORLD_SIZE"``.

    Raises:
        ConfigError: with the arithmetic, when the numbers do not multiply or are too few.
    """
    for name, given in ((GLOBAL, train), (MICRO, micro), (ACCUMULATION, accumulation)):
        _check_size(name, given)
    shards = f"{data_shards} (data shards{f' = {shards_origin}' if shards_origin else ''})"
    if train is None:
        if micro is None:
            raise ConfigError(
                f"one of {GLOBAL} and {MICRO} is required: "
                f"{GLOBAL} = {MICRO} x {ACCUMULATION} x {shards}"
            )
        accumulation = accumulation or 1
        train = micro * accumulation * data_shards
        _check_size(f"{GLOBAL} = {MICRO} x {ACCUMULATION} x {shards} =", train)
        return Batch(train, micro, accumulation, data_shards)
    if micro is not None and accumulation is not None:
        if micro * accumulation * data_shards != train:
            product = micro * accumulation * data_shards
            raise ConfigError(
                f"{GLOBAL} {train} != {micro} ({MICRO}) x {accumulation} ({ACCUMULATION}) x "
                f"{shards} = {product}; change one of them, or leave one out to have it derived"
            )
        return Batch(train, micro, accumulation, data_shards)
    if micro is None:
        accumulation = accumulation or 1
        micro = _divide(train, accumulation, ACCUMULATION, data_shards, shards, MICRO)
    else:
        accumulation = _divide(train, micro, MICRO, data_shards, shards, ACCUMULATION)
    return Batch(train, micro, accumulation, data_shards)


def _check_size(name: str, value: int | None) -> None:
    if value is not None and value > LARGEST:
        shown = value if value < 2**63 else f"2^{value.bit_length() - 1} and more"
        raise ConfigError(f"{name} {shown} is too large, the most is {LARGEST}")


def _divide(train: int, value: int, name: str, data_shards: int, shards: str, wanted: str) -> int:
    divisor = value * data_shards
    if train % divisor:
        below, above = train - train % divisor, train - train % divisor + divisor
        near = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            f"{GLOBAL} {train} cannot be divided by {value} ({name}) x {shards} = {divisor} to "
            f"give {wanted}; the nearest possible is {near}"
        )
    return train // divisor
