"""One global batch that many numbers of ranks can share out: pure arithmetic.

A global batch C fits n ranks if some micro-batch m gives C = m x accumulation x n. Candidates are
small numbers (each micro-batch, and the least common multiple of all) times a highly composite
number, which has more divisors than any smaller one; the candidate that fits most numbers of ranks
wins. Results are those of DeepSpeed, versions 0.1 and 0.2 of its arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import lcm
from typing import TYPE_CHECKING, Any

from drivetrain.errors import ConfigError

if TYPE_CHECKING:
    from drivetrain_elasticity.section import ElasticitySection

_MOST = 720_720
"""Highly composite numbers are used up to this one."""


@dataclass(frozen=True)
class ElasticBatch:
    """A global batch, and who can share it out.

    Args:
        train_batch_size: samples of a step.
        sizes: numbers of ranks (0.1) or of data shards (0.2) that fit, ascending.
        micro_batch_size: of the number of ranks that was asked for; ``None`` if none was.
    """

    train_batch_size: int
    sizes: tuple[int, ...]
    micro_batch_size: int | None = None


def highly_composite(most: int = _MOST) -> list[int]:
    """Numbers up to ``most`` that have more divisors than every smaller one, ascending."""
    # Such a number is a product of the first primes with exponents that do not rise.
    found = [(1, 1)]
    _extend(found, 1, 1, 0, 64, most)
    kept: list[int] = []
    best = 0
    for number, divisors in sorted(found):
        if divisors > best:
            kept.append(number)
            best = divisors
    return kept


_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19)


def _extend(
    found: list[tuple[int, int]], number: int, divisors: int, place: int, most_power: int, most: int
) -> None:
    """Append (number, number of its divisors) for all further primes and powers."""
    if place == len(_PRIMES):
        return
    for power in range(1, most_power + 1):
        number *= _PRIMES[place]
        if number > most:
            return
        found.append((number, divisors * (power + 1)))
        _extend(found, number, divisors * (power + 1), place + 1, power, most)


def valid_sizes(batch: int, micro: Iterable[int], least: int, most: int) -> list[int]:
    """Numbers of ranks in [least, most] that can share out ``batch``, ascending."""
    found = {
        size
        for each in micro
        if batch % each == 0
        for size in _divisors(batch // each)
        if least <= size <= most
    }
    return sorted(found)


def _divisors(number: int) -> Iterator[int]:
    low = 1
    while low * low <= number:
        if number % low == 0:
            yield low
            yield number // low
        low += 1


def solve(section: ElasticitySection, ranks: int = 0) -> ElasticBatch:
    """The batch of a job.

    Args:
        section: what the config says.
        ranks: of the job as it is now; 0 for none in particular.

    Raises:
        ConfigError: no batch fits, or none fits ``ranks``.
    """
    if section.version == 0.1:
        found = _best(section, section.max_train_batch_size, section.min_gpus, section.max_gpus)
        return _for_ranks(found, section, ranks) if ranks else found
    return _solve_hosts(section, ranks)


def _best(section: ElasticitySection, most: int, least_size: int, most_size: int) -> ElasticBatch:
    """The candidate up to ``most`` that fits most sizes; ties go to the larger or smaller batch."""
    micro = section.micro_batch_sizes
    numbers = highly_composite()
    bases = {base for base in (*micro, lcm(*micro)) if base <= most}
    candidates = {
        base if base == most else base * max(n for n in numbers if n <= most // base)
        for base in bases
    }
    sign = 1 if section.prefer_larger_batch else -1
    fitting = [(valid_sizes(c, micro, least_size, most_size), c) for c in candidates]
    sizes, batch = max(fitting, key=lambda pair: (len(pair[0]), sign * pair[1]), default=([], 0))
    if not sizes:
        raise ConfigError(
            f"elasticity: no global batch up to {most} made of micro-batches {_listed(micro)} fits "
            f"any number of ranks from {least_size} to {most_size}; allow a larger "
            "max_train_batch_size, smaller micro_batch_sizes or fewer ranks"
        )
    return ElasticBatch(batch, tuple(sizes))


def _for_ranks(found: ElasticBatch, section: ElasticitySection, shards: int) -> ElasticBatch:
    if shards not in found.sizes:
        raise ConfigError(
            f"elasticity: a global batch of {found.train_batch_size} cannot be shared out over "
            f"{shards} data shards by micro-batches of {_listed(section.micro_batch_sizes)}; "
            f"numbers that fit: {_near(found.sizes, shards)}"
        )
    each = found.train_batch_size // shards
    micro = max(m for m in section.micro_batch_sizes if each % m == 0)
    return ElasticBatch(found.train_batch_size, found.sizes, micro)


def _solve_hosts(section: ElasticitySection, ranks: int) -> ElasticBatch:
    """Version 0.2: hosts come and go as a whole, and ranks of one host may share a model."""
    per_host, model = section.num_gpus_per_node, section.model_parallel_size
    shards_per_host = per_host // model
    fewest, most = section.min_gpus // per_host or 1, section.max_gpus // per_host or 10_000
    hosts = _best(section, section.max_train_batch_size // shards_per_host, fewest, most)
    batch = hosts.train_batch_size * shards_per_host
    found = ElasticBatch(batch, tuple(size * shards_per_host for size in hosts.sizes))
    if not ranks:
        return found
    if ranks % model:
        raise ConfigError(
            f"elasticity: {ranks} ranks cannot be divided by model_parallel_size {model}"
        )
    shards = ranks // model
    if shards in found.sizes:
        micro = section.micro_batch_sizes
        fitting = [m for m in micro if (batch // shards) % m == 0]
        if fitting:
            chosen = max(fitting) if section.prefer_larger_batch else fitting[0]
            return ElasticBatch(batch, found.sizes, chosen)
    return _for_this_size(section, shards)


def _for_this_size(section: ElasticitySection, shards: int) -> ElasticBatch:
    """A batch that fits the ranks there are, where the elastic one does not."""
    most = section.max_train_batch_size
    made = {m: most // (m * shards) * m * shards for m in section.micro_batch_sizes}
    made = {micro: batch for micro, batch in made.items() if batch}
    if not made:
        raise ConfigError(
            f"elasticity: {shards} data shards cannot share out a global batch of at most {most} "
            f"by micro-batches of {_listed(section.micro_batch_sizes)}: the smallest is "
            f"{min(section.micro_batch_sizes)} x {shards} = "
            f"{min(section.micro_batch_sizes) * shards}"
        )
    pick = max if section.prefer_larger_batch else min
    batch = pick(made.values())
    micro = max(m for m, b in made.items() if b == batch)
    return ElasticBatch(batch, (shards,), micro)


def compute_elastic_config(
    ds_config: Mapping[str, Any],
    target_deepspeed_version: str = "",
    world_size: int = 0,
    return_microbatch: bool = False,
) -> tuple[int, list[int]] | tuple[int, list[int], int | None]:
    """The batch of a config's section ``elasticity``.

    Args:
        ds_config: the whole config.
        target_deepspeed_version: accepted, has no effect.
        world_size: number of ranks; 0 for none in particular.
        return_microbatch: return the micro-batch without a ``world_size``, too.

    Returns:
        Global batch, and numbers of ranks (or data shards) that fit; with ``world_size`` or
        ``return_microbatch`` also the micro-batch of so many ranks, ``None`` without any.

    Raises:
        ConfigError: there is no such section, it is wrong, or nothing fits.
    """
    from pydantic import ValidationError

    from drivetrain_elasticity.section import ElasticitySection

    if "elasticity" not in ds_config:
        raise ConfigError("the config has no section elasticity")
    try:
        section = ElasticitySection.model_validate(ds_config["elasticity"])
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, ('elasticity', *each['loc'])))}: {each['msg']}"
            for each in error.errors()
        ]
        raise ConfigError("; ".join(problems)) from error
    found = solve(section, world_size)
    if world_size or return_microbatch:
        return found.train_batch_size, list(found.sizes), found.micro_batch_size
    return found.train_batch_size, list(found.sizes)


def _near(sizes: Sequence[int], wanted: int) -> str:
    """The sizes around ``wanted``, for messages."""
    below = [size for size in sizes if size < wanted][-3:]
    above = [size for size in sizes if size > wanted][:3]
    return _listed([*below, *above])


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
