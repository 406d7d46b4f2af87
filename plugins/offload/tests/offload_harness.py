"""Jobs with offload, homes over a few tensors, and buckets in which everything is odd."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from drivetrain_offload.placement import homes_of
from drivetrain_offload.section import Aio, OffloadOptimizer, OffloadParam
from drivetrain_offload.zenflow_section import ZenFlow

from drivetrain.contracts import BucketSpec, Segment, StateHome, UpdateRule
from drivetrain.job.job import Job
from drivetrain.plan.plan import Plan
from drivetrain.states.device_home import DeviceHome

PRECISIONS: Mapping[str, tuple[torch.dtype, torch.dtype, torch.dtype]] = {
    "fp32": (torch.float32, torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float16, torch.float32),
    "bf16 added up in fp32": (torch.bfloat16, torch.float32, torch.float32),
    "bf16 without masters": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
}
"""Name -> dtypes of parameters, gradients and masters."""

SHAPES: Sequence[tuple[int, ...]] = ((5, 7), (11,), (3, 2, 4))


def config(**offload: Any) -> dict[str, Any]:
    """A job with AdamW and offload to the host."""
    return {
        "train_batch_size": 8,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1}},
        "zero_optimization": {"offload_optimizer": {"device": "cpu", **offload}},
    }


@contextmanager
def opened(**changes: Any) -> Iterator[Job]:
    """A job of one rank."""
    with Job.open(Plan.build({**config(), **changes}, world_size=1)) as job:
        yield job


def spec_of(
    rule: UpdateRule | None, precision: str = "bf16", key: str = "b0", padding: int = 3
) -> BucketSpec:
    """A bucket of a few tensors of odd sizes."""
    parameter, gradient, master = PRECISIONS[precision]
    segments: list[Segment] = []
    offset = 0
    for number, shape in enumerate(SHAPES):
        numel = torch.Size(shape).numel()
        segments.append(Segment(f"{key}.p{number}", shape, 0, numel, offset))
        offset += numel
    return BucketSpec(
        key=key,
        numel=offset + padding,
        segments=tuple(segments),
        parameter_dtype=parameter,
        gradient_dtype=gradient,
        master_dtype=master,
        state_dtype=torch.float32,
        reduction=("dp",),
        rule=rule,
        group=0,
        device=torch.device("cpu"),
    )


def values(spec: BucketSpec, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers for every element, reproducible."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(spec.numel, generator=generator).to(dtype)


def adopt(home: StateHome) -> torch.Tensor:
    """Hand a home its bucket; the parameters."""
    originals = values(home.spec, 1)
    parameters = originals.to(home.spec.parameter_dtype).clone()
    home.adopt(parameters, originals)
    return parameters


def place(
    job: Job, specs: Sequence[BucketSpec], zenflow: ZenFlow | None = None, **section: Any
) -> list[StateHome]:
    """The homes that a section gives to buckets."""
    optimizer = OffloadOptimizer.model_validate({"device": "cpu", **section})
    return homes_of(job, specs, optimizer, OffloadParam(), Aio(), zenflow)


def states(home: StateHome) -> dict[tuple[str, str], torch.Tensor]:
    """Copies of all fragments by (name, kind), in order of their elements."""
    found: dict[tuple[str, str], torch.Tensor] = {}
    for fragment in home.fragments():
        key = (fragment.name, fragment.kind)
        whole = found.setdefault(key, torch.zeros(fragment.global_shape, dtype=fragment.dtype))
        for box in fragment.boxes:
            box.of(whole).copy_(box.of_storage(fragment.read()))
    return found


def on_device(spec: BucketSpec) -> tuple[DeviceHome, torch.Tensor]:
    """What homes are held against: states beside the parameters, updated in line."""
    home = DeviceHome(replace(spec))
    return home, adopt(home)


def step(home: StateHome, gradient: torch.Tensor, hyper: Any, scale: Any = 1.0) -> None:
    """One step of the usual way."""
    gradient = gradient.clone()  # rules may overwrite it
    home.gradient_ready(gradient)
    home.update(gradient, hyper, scale)
    home.publish()


def assert_same(
    home: StateHome, parameters: torch.Tensor, other: StateHome, expected: torch.Tensor
) -> None:
    """Parameters, states and step count agree, bit for bit."""
    assert torch.equal(parameters, expected)
    mine, theirs = states(home), states(other)
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(mine[key], value), key
    assert home.step == other.step
