"""The config section ``autotuning``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from drivetrain.contracts import NO_EFFECT, Bool, PositiveFloat, PositiveInt, Section

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
    min_train_batch_size: PositiveInt = Field(
        default=1, description="Smallest global batch that is tried."
    )
    max_train_batch_size: PositiveInt | None = Field(
        default=None, description="Largest global batch that is tried."
    )
    arg_mappings: dict[str, str] | None = Field(
        default=None,
        description="Config path -> option of the script that must say the same, such as "
        '{"train_micro_batch_size_per_gpu": "--batch-size"}; it gets the value of each trial.',
    )
    mp_size: PositiveInt | None = Field(
        default=None,
        description=f"{NO_EFFECT}the config's own sections say how ranks share layers.",
    )
    metric_path: str | None = Field(
        default=None, description=f"{NO_EFFECT}trials report by themselves."
    )
    model_info: dict[str, Any] | None = Field(
        default=None, description=f"{NO_EFFECT}a plan measures the model, see --model."
    )
    model_info_path: str | None = Field(
        default=None, description=f"{NO_EFFECT}a plan measures the model, see --model."
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
        most = self.max_train_batch_size
        if most is not None and most < self.min_train_batch_size:
            raise ValueError(
                f"max_train_batch_size ({most}) is below min_train_batch_size "
                f"({self.min_train_batch_size})"
            )
        for path, values in self.space.items():
            if not values:
                raise ValueError(f"space has no value for {path}")
        return self
