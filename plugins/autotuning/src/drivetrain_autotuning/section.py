"""The config section ``autotuning``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from drivetrain.contracts import Bool, PositiveFloat, PositiveInt, Section

PATH = "autotuning"


class AutotuningSection(Section):
    """What ``drivetrain tune`` tries, and by what it chooses."""

    enabled: Bool = Field(default=False, description="For drivetrain tune; a job ignores it.")
    fast: Bool = Field(
        default=True, description="Try stages and micro-batches alone, not buckets and offload."
    )
    results_dir: str = Field(default="autotuning_results", description="Where the best goes.")
    exps_dir: str = Field(
        default="autotuning_exps", description="What was tried; a later run goes on from it."
    )
    overwrite: Bool = Field(default=False, description="Forget what was tried before.")
    metric: Literal["throughput", "latency", "flops"] = Field(
        default="throughput",
        description="Samples a second, seconds of a step, or operations a second of a rank.",
    )
    start_profile_step: PositiveInt = Field(default=3, description="First step that counts.")
    end_profile_step: PositiveInt = Field(default=5, description="Last step; then a trial ends.")
    tuner_type: Literal["gridsearch", "random", "model_based"] = Field(
        default="model_based",
        description="Every config in order, at random, or where a model of those tried says.",
    )
    tuner_num_trials: PositiveInt = Field(default=50, description="Most trials.")
    tuner_early_stopping: PositiveInt = Field(
        default=5, description="End after so many trials without a better one."
    )
    num_tuning_micro_batch_sizes: PositiveInt = Field(
        default=3, description="Micro-batches that are tried, the largest first."
    )
    min_train_micro_batch_size_per_gpu: PositiveInt = Field(default=1, description="Smallest.")
    max_train_micro_batch_size_per_gpu: PositiveInt | None = Field(
        default=None, description="Largest; by default eight times that of the config."
    )
    space: dict[str, list[Any]] = Field(
        default_factory=dict,
        description="Config path -> values to try; in place of the usual ones.",
    )
    timeout: PositiveFloat = Field(default=600.0, description="Seconds after which a trial ends.")
    trial: str | None = Field(
        default=None, description="Written by the tuner: where a trial's rank 0 puts its times."
    )

    @model_validator(mode="after")
    def _steps_are_in_order(self) -> AutotuningSection:
        if self.end_profile_step < self.start_profile_step:
            raise ValueError(
                f"end_profile_step ({self.end_profile_step}) is before start_profile_step "
                f"({self.start_profile_step})"
            )
        for path, values in self.space.items():
            if not values:
                raise ValueError(f"space has no value for {path}")
        return self
