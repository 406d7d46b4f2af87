"""The config sections of offload: optimizer states, parameters, and asynchronous I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from drivetrain.contracts import (
    NO_EFFECT,
    Bool,
    Float,
    NonNegativeInt,
    PathText,
    PositiveInt,
    Section,
)


class OffloadOptimizer(Section):
    """Where master weights and optimizer states live, and where they are updated."""

    device: Literal["none", "cpu", "nvme"] = Field(
        default="none", description="Home of the states: the device, host memory or files."
    )
    nvme_path: PathText | None = Field(
        default=None, description="Folder for files; needed for nvme."
    )
    pin_memory: Bool = Field(
        default=True,
        description="Lock the host memory that the device copies from and to: a few buffers.",
    )
    pinned_memory_budget: PositiveInt | None = Field(
        default=None,
        description="Largest number of bytes that one rank locks; null for as many as it needs.",
    )
    buffer_count: PositiveInt = Field(
        default=16,
        ge=2,
        description="Tiles of states held in host memory at once when they live in files; fewer "
        "of larger ones, where an update rule has to see more than a tile.",
    )
    buffer_size: PositiveInt = Field(
        default=1_048_576,
        description="Largest number of parameters in a tile of states that live in files.",
    )
    pipeline_read: Bool = Field(
        default=True, description="Read the next tiles while one is updated."
    )
    pipeline_write: Bool = Field(
        default=True, description="Write updated tiles while the next one is updated."
    )
    fast_init: Bool = Field(
        default=False, description=f"{NO_EFFECT}files are made in one sequential pass."
    )
    ratio: Float = Field(
        default=1.0,
        ge=0.0,
        le=1.0,
        description="Share of the states that is offloaded; the device keeps and updates the rest.",
    )
    delayed_update: Bool = Field(
        default=False,
        description="Apply every update one step late, so that the host computes it while the "
        "device goes on (delayed parameter update of ZeRO-Offload, arXiv:2101.06840, section 5.2).",
    )
    super_offload: Bool = Field(
        default=False,
        description="Update each bucket as soon as its gradient is there, before it is known "
        "whether the step is clipped or skipped, and take it back where it is (arXiv:2509.21271).",
    )
    cpuadam_cores_perc: Float = Field(
        default=0.8,
        gt=0.0,
        le=1.0,
        description="Share of a rank's threads (OMP_NUM_THREADS, or its cores) that updates on the "
        "host use beside a device; a rank whose device is the CPU updates with all of them.",
    )

    @model_validator(mode="after")
    def _possible(self) -> OffloadOptimizer:
        if self.device == "nvme" and not self.nvme_path:
            raise ValueError("device is nvme, which needs nvme_path: the folder for the files")
        return self


class OffloadParam(Section):
    """Where the shards of parameters live between their uses, at stage 3."""

    device: Literal["none", "cpu", "nvme"] = Field(
        default="none", description="Home of the shards: the device, host memory or files."
    )
    nvme_path: PathText | None = Field(
        default=None, description="Folder for files; needed for nvme."
    )
    pin_memory: Bool = Field(
        default=True, description="Lock host memory that the device copies from and to."
    )
    buffer_count: PositiveInt = Field(
        default=5,
        description="Memory near the states, in shards of the largest bucket: for what is read "
        "ahead of an update or written behind it.",
    )
    buffer_size: PositiveInt = Field(
        default=100_000_000, description=f"{NO_EFFECT}buffers are as large as the shards."
    )
    max_in_cpu: NonNegativeInt = Field(
        default=1_000_000_000,
        description="Largest number of parameters of a rank that stay in host memory when the "
        "rest lives in files.",
    )

    @model_validator(mode="after")
    def _possible(self) -> OffloadParam:
        if self.device == "nvme" and not self.nvme_path:
            raise ValueError("device is nvme, which needs nvme_path: the folder for the files")
        return self


class Aio(Section):
    """Asynchronous file I/O."""

    renamed: ClassVar[Mapping[str, str]] = {"thread_count": "intra_op_parallelism"}

    block_size: PositiveInt = Field(
        default=1_048_576, description="Bytes of one request to the system; a multiple of 4096."
    )
    queue_depth: PositiveInt = Field(
        default=8, description="Requests under way at once, per thread."
    )
    intra_op_parallelism: PositiveInt = Field(
        default=1, description="Threads that share one read or write."
    )
    single_submit: Bool = Field(
        default=False, description="Hand requests to the system one at a time."
    )
    overlap_events: Bool = Field(
        default=True, description="Hand over new requests while others are under way."
    )
    use_gds: Bool = Field(
        default=False,
        description="Between files and a GPU directly; refused, since no accelerator can yet.",
    )
    engine: Literal["auto", "io_uring", "libaio", "threads"] = Field(
        default="auto", description="The system's interface; auto takes the first that works."
    )

    @model_validator(mode="after")
    def _aligned(self) -> Aio:
        if self.block_size % 4096:
            raise ValueError(f"block_size is {self.block_size}, expected a multiple of 4096")
        return self
