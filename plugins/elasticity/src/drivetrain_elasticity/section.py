"""The config sections ``elasticity``, ``preemption`` and ``survival``."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from drivetrain.contracts import Bool, PathText, PositiveInt, Section

VERSIONS = (0.1, 0.2)


class ElasticitySection(Section):
    """One global batch for every number of ranks that a job may have."""

    enabled: Bool = Field(default=False, description="Derive the batch sizes.")
    max_train_batch_size: PositiveInt = Field(
        default=2000, description="The global batch is at most this."
    )
    micro_batch_sizes: tuple[PositiveInt, ...] = Field(
        default=(2, 4, 6), min_length=1, description="Micro-batches that fit into memory."
    )
    min_gpus: PositiveInt = Field(default=1, description="Fewest ranks of the job.")
    max_gpus: PositiveInt = Field(default=10000, description="Most ranks of the job.")
    min_time: int = Field(default=0, ge=0, description="For schedulers; without effect here.")
    prefer_larger_batch: Bool = Field(
        default=True, description="Of batches that fit equally many sizes, take the larger one."
    )
    ignore_non_elastic_batch_info: Bool = Field(
        default=False, description="Accept batch sizes beside this section, and overrule them."
    )
    version: float = Field(
        default=0.2, description="0.1, or 0.2 that counts whole hosts of `num_gpus_per_node` ranks."
    )
    num_gpus_per_node: PositiveInt = Field(default=1, description="Ranks of a host, for 0.2.")
    model_parallel_size: PositiveInt = Field(
        default=1, description="Ranks that share a model, for 0.2."
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.version not in VERSIONS:
            raise ValueError(f"version {self.version} is not known; there are 0.1 and 0.2")
        if self.min_gpus > self.max_gpus:
            raise ValueError(f"min_gpus {self.min_gpus} is more than max_gpus {self.max_gpus}")
        if min(self.micro_batch_sizes) > self.max_train_batch_size:
            raise ValueError(
                f"max_train_batch_size {self.max_train_batch_size} is less than the smallest of "
                f"micro_batch_sizes, {min(self.micro_batch_sizes)}"
            )
        if self.version == 0.1 and self.model_parallel_size > 1:
            raise ValueError("model_parallel_size needs version 0.2")
        if self.num_gpus_per_node % self.model_parallel_size:
            raise ValueError(
                f"num_gpus_per_node {self.num_gpus_per_node} is no multiple of "
                f"model_parallel_size {self.model_parallel_size}"
            )
        return self


class PreemptionSection(Section):
    """Save a checkpoint and end when the job is told to leave."""

    enabled: Bool = Field(default=False, description="Wait for the signals.")
    save_dir: PathText = Field(default="", description="Folder of the checkpoints.")
    signals: tuple[Literal["SIGTERM", "SIGUSR1", "SIGUSR2"], ...] = Field(
        default=("SIGTERM",), min_length=1, description="What tells the job to leave."
    )

    @model_validator(mode="after")
    def _has_a_folder(self) -> Self:
        if self.enabled and not self.save_dir:
            raise ValueError("save_dir is needed: the folder that checkpoints are saved in")
        return self


class SpikeSection(Section):
    """Go back to the latest copy after a loss that stands out, and leave its data out."""

    factor: float = Field(
        gt=1, allow_inf_nan=False, description="A loss of more than this times the median."
    )
    window: int = Field(default=50, ge=4, description="Steps that the median is over.")
    at_most: PositiveInt = Field(
        default=3, description="Times in a row before the job ends with an error."
    )


class SurvivalSection(Section):
    """Keep copies of the job's state in memory, in a process that outlives the workers."""

    enabled: Bool = Field(default=True, description="Make copies.")
    every: PositiveInt = Field(default=10, description="Steps between two copies.")
    spike: SpikeSection | None = Field(
        default=None, description="When to go back to a copy by itself; by default never."
    )
