"""The ``data_efficiency`` section and what makes one consistent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, model_validator

from drivetrain.contracts import Bool, NonNegativeInt, PathText, PositiveFloat, PositiveInt, Section

PATH = "data_efficiency"

ScheduleType = Literal["fixed_linear", "fixed_root", "fixed_discrete", "custom"]

_NEEDED = {
    "fixed_linear": {"total_curriculum_step", "difficulty_step"},
    "fixed_root": {"total_curriculum_step", "difficulty_step", "root_degree"},
    "fixed_discrete": {"difficulty", "max_step"},
    "custom": set[str](),
}


class DifficultyConfig(Section):
    """How a difficulty grows; which keys are needed depends on ``schedule_type``."""

    total_curriculum_step: PositiveInt | None = Field(
        default=None, description="Steps until the largest difficulty (fixed_linear, fixed_root)."
    )
    difficulty_step: PositiveInt | None = Field(
        default=None, description="Difficulties are multiples of this (fixed_linear, fixed_root)."
    )
    root_degree: PositiveFloat | None = Field(
        default=None, description="Progress enters as its root of this degree (fixed_root)."
    )
    difficulty: tuple[PositiveInt, ...] | None = Field(
        default=None, description="One difficulty for each stage (fixed_discrete)."
    )
    max_step: tuple[NonNegativeInt, ...] | None = Field(
        default=None, description="Last step of each stage but the last (fixed_discrete)."
    )

    @model_validator(mode="after")
    def _stages_fit(self) -> DifficultyConfig:
        if self.difficulty is None or self.max_step is None:
            return self
        if len(self.difficulty) != len(self.max_step) + 1:
            raise ValueError(
                f"difficulty has {len(self.difficulty)} stages and max_step ends "
                f"{len(self.max_step)} of them; there must be an end for each but the last"
            )
        for name, values in (("difficulty", self.difficulty), ("max_step", self.max_step)):
            if list(values) != sorted(values):
                raise ValueError(f"{name} must not fall, got {list(values)}")
        return self


class MetricSection(Section):
    """One measure of how difficult a sample is, and how far training has opened it."""

    index_to_sample_path: PathText | None = Field(
        default=None,
        description="Analyzer's file (prefix): samples of each value, rising. Not needed with "
        "single_cluster.",
    )
    index_to_metric_path: PathText | None = Field(
        default=None, description="Analyzer's file (prefix): the values. For difficulty_type value."
    )
    difficulty_type: Literal["value", "percentile"] = Field(
        default="value", description="What a difficulty is: a value, or so many percent of samples."
    )
    clustering_type: Literal["schedule_based", "single_cluster"] = Field(
        default="schedule_based",
        description="Open samples by difficulty, or all at once; then the batch is changed.",
    )
    min_difficulty: PositiveInt = Field(description="First difficulty.")
    max_difficulty: PositiveInt = Field(description="Last difficulty.")
    schedule_type: ScheduleType = Field(description="How it grows; custom takes a function.")
    schedule_config: DifficultyConfig = Field(
        default=DifficultyConfig(), description="The schedule's own keys."
    )
    truncate: Bool = Field(
        default=False,
        description="Cut sequences (dimension 1) to the difficulty, in tokens.",
    )

    @model_validator(mode="after")
    def _is_complete(self) -> MetricSection:
        first, last = self.min_difficulty, self.max_difficulty
        if first > last:
            raise ValueError(f"min_difficulty {first} is larger than max_difficulty {last}")
        if self.difficulty_type == "percentile" and last > 100 and self.opens:
            raise ValueError(f"max_difficulty {last} is more than 100 percent")
        given = {k for k, v in self.schedule_config.model_dump().items() if v is not None}
        needed = _NEEDED[self.schedule_type]
        if given != needed:
            wanted, got = (", ".join(sorted(keys)) or "(none)" for keys in (needed, given))
            raise ValueError(
                f"schedule_config of {self.schedule_type} has the keys {wanted}; got {got}"
            )
        stages = self.schedule_config.difficulty
        if stages and not first <= stages[0] <= stages[-1] <= last:
            raise ValueError(f"difficulty {list(stages)} leaves [{first}, {last}]")
        if self.opens:
            need = ["index_to_sample_path"]
            need += ["index_to_metric_path"] if self.difficulty_type == "value" else []
            if missing := [key for key in need if getattr(self, key) is None]:
                raise ValueError(f"{self.difficulty_type} and schedule_based need {missing[0]}")
        return self

    @property
    def opens(self) -> bool:
        """True if the difficulty decides which samples may come."""
        return self.clustering_type == "schedule_based"


class CurriculumLearningSection(Section):
    """Samples come in by difficulty, easy ones first (second form of curriculum learning)."""

    enabled: Bool = Field(default=False, description="Deal samples out by difficulty.")
    data_cluster_path: PathText | None = Field(
        default=None,
        description="Folder for lists of samples; needed where several metrics open samples.",
    )
    curriculum_metrics: dict[str, MetricSection] = Field(
        default={}, description="Name of a metric -> its schedule; any number."
    )

    @model_validator(mode="after")
    def _has_metrics(self) -> CurriculumLearningSection:
        if not self.enabled:
            return self
        if not self.curriculum_metrics:
            raise ValueError("curriculum_metrics needs at least one metric")
        opening = [name for name, m in self.curriculum_metrics.items() if m.opens]
        if len(opening) > 1 and self.data_cluster_path is None:
            raise ValueError(
                f"{' and '.join(opening)} open samples together, which needs data_cluster_path"
            )
        return self


class DynamicBatchingSection(Section):
    """Micro-batches by their number of tokens."""

    enabled: Bool = Field(default=False, description="Make micro-batches by tokens.")
    max_tokens: PositiveInt | None = Field(
        default=None, description="Most tokens of a micro-batch; required."
    )
    metrics_path: PathText | None = Field(
        default=None,
        description="Folder of the analyzer with seqlen/seqlen_sample_to_metric; without it the "
        "data set has lengths.",
    )
    lr_scaling_method: Literal["linear", "sqrt", "none"] = Field(
        default="linear", description="How the rate follows the samples of a step."
    )
    base_batch_size: PositiveInt | None = Field(
        default=None,
        description="Samples of a step that the rate is meant for; the mean of all steps if unset.",
    )
    min_batch_size: PositiveInt = Field(default=1, description="Fewest samples of a micro-batch.")
    max_batch_size: PositiveInt | None = Field(
        default=None, description="Most samples of a micro-batch."
    )
    sequence_picking_order: Literal["dataloader", "random", "seqlen"] = Field(
        default="dataloader",
        description="Take samples as they are, shuffled every epoch, or by length.",
    )
    pad: Bool = Field(
        default=False,
        description="Count padding to the longest sample as tokens, as for padded micro-batches.",
    )
    pack: Bool = Field(
        default=False,
        description="Join the samples of a micro-batch in one row, each with positions of its own.",
    )
    verbose: Bool = Field(default=False, description="Log what micro-batches are made of.")

    @model_validator(mode="after")
    def _fits(self) -> DynamicBatchingSection:
        if not self.enabled:
            return self
        if self.max_tokens is None:
            raise ValueError("needs max_tokens")
        if self.max_batch_size is not None and self.max_batch_size < self.min_batch_size:
            raise ValueError(
                f"min_batch_size {self.min_batch_size} is larger than max_batch_size "
                f"{self.max_batch_size}"
            )
        if self.pack and self.pad:
            raise ValueError("pack leaves no padding, so pad has no meaning; leave one out")
        return self


class DataSamplingSection(Section):
    """Which samples come when."""

    enabled: Bool = Field(default=False, description="Switch for all that is below.")
    num_epochs: PositiveInt = Field(
        default=1000, description="With a curriculum, samples of a pass by those of the data set."
    )
    num_workers: NonNegativeInt = Field(
        default=0, description="Processes that load, with a curriculum or dynamic batching."
    )
    pin_memory: Bool = Field(default=False, description="Page-locked batches, with either of them.")
    curriculum_learning: CurriculumLearningSection = Field(
        default=CurriculumLearningSection(), description="Samples by difficulty."
    )
    dynamic_batching: DynamicBatchingSection = Field(
        default=DynamicBatchingSection(), description="Micro-batches by tokens."
    )


class LtdScheduleConfig(Section):
    """How many tokens are kept."""

    require_steps: PositiveInt = Field(description="Steps until no token is dropped.")
    seq_per_step: PositiveInt = Field(description="Numbers of tokens are multiples of this.")


class LtdSchedule(Section):
    """From how many kept tokens to how many, and when."""

    min_value: PositiveInt = Field(description="Tokens kept of a sequence at first.")
    max_value: PositiveInt = Field(description="Tokens kept at last.")
    schedule_type: Literal["fixed_linear"] = Field(
        default="fixed_linear", description="How the number grows; the only choice."
    )
    schedule_config: LtdScheduleConfig = Field(description="Speed and granularity.")

    @model_validator(mode="after")
    def _rises(self) -> LtdSchedule:
        if self.min_value > self.max_value:
            raise ValueError(f"min_value {self.min_value} is larger than max_value")
        return self


class LayerTokenRate(Section):
    """A factor on the learning rate that counts layer tokens instead of steps."""

    enabled: Bool = Field(default=False, description="Multiply the rate by it.")
    total_layer_tokens: PositiveInt | None = Field(
        default=None, description="Layer tokens after which the factor is 0; required."
    )
    warmup_type: Literal["linear"] = Field(default="linear", description="Shape of the warm-up.")
    warmup_layer_tokens: NonNegativeInt = Field(default=0, description="Layer tokens of warm-up.")
    decay_type: Literal["linear", "cosine", "none"] = Field(
        default="cosine", description="Shape after the warm-up."
    )

    @model_validator(mode="after")
    def _ends_later(self) -> LayerTokenRate:
        if not self.enabled:
            return self
        if self.total_layer_tokens is None:
            raise ValueError("needs total_layer_tokens")
        if self.warmup_layer_tokens >= self.total_layer_tokens:
            raise ValueError("warmup_layer_tokens must be less than total_layer_tokens")
        return self


class RateSchedule(Section):
    """A factor on the learning rate that counts steps, samples or tokens."""

    enabled: Bool = Field(default=False, description="Multiply the rate by it.")
    by: Literal["steps", "samples", "tokens"] = Field(
        default="tokens",
        description="What is counted, over all ranks: steps, samples, or tokens after sequences "
        "were cut.",
    )
    total: PositiveInt | None = Field(
        default=None, description="Count after which the factor is 0; required."
    )
    warmup: NonNegativeInt = Field(default=0, description="Count of the warm-up, which is linear.")
    decay_type: Literal["linear", "cosine", "none"] = Field(
        default="cosine", description="Shape after the warm-up."
    )

    @model_validator(mode="after")
    def _ends_later(self) -> RateSchedule:
        if self.enabled and self.total is None:
            raise ValueError("needs total")
        if self.total is not None and self.warmup >= self.total:
            raise ValueError(f"warmup {self.warmup} must be less than total {self.total}")
        return self


class RandomLtdSection(Section):
    """Layers see a random part of each sequence's tokens; the others pass them by."""

    enabled: Bool = Field(default=False, description="Drop tokens in training.")
    total_layer_num: PositiveInt | None = Field(
        default=None, description="Layers of the model; counted if unset, else it must agree."
    )
    random_ltd_layer_num: PositiveInt | None = Field(
        default=None, description="Layers that drop; must agree with random_ltd_layer_id."
    )
    random_ltd_layer_id: tuple[NonNegativeInt, ...] | None = Field(
        default=None,
        description="Layers that drop, counted from 0 in the model's order; all but the first and "
        "last if unset.",
    )
    model_mask_name: str | None = Field(
        default=None,
        description="Keyword of the attention mask; those called so in Transformers are known.",
    )
    model_type: Literal["decoder", "encoder"] = Field(
        default="decoder",
        description="Whether a layer without mask is causal; only told, as masks are cut by token.",
    )
    hidden_state_order: Literal["batch_seq_dim", "seq_batch_dim"] = Field(
        default="batch_seq_dim", description="Order of a hidden state's dimensions."
    )
    random_ltd_schedule: LtdSchedule | None = Field(
        default=None, description="How many tokens are kept; required."
    )
    layer_token_lr_schedule: LayerTokenRate = Field(
        default=LayerTokenRate(), description="A factor on the learning rate."
    )

    @model_validator(mode="after")
    def _agrees(self) -> RandomLtdSection:
        if not self.enabled:
            return self
        if self.random_ltd_schedule is None:
            raise ValueError("needs random_ltd_schedule")
        layers, number = self.random_ltd_layer_id, self.random_ltd_layer_num
        if layers is not None and len(set(layers)) != len(layers):
            raise ValueError(f"random_ltd_layer_id names a layer twice: {list(layers)}")
        if layers is not None and number is not None and number != len(layers):
            raise ValueError(
                f"random_ltd_layer_num is {number}, but random_ltd_layer_id has {len(layers)}"
            )
        return self


class DataRoutingSection(Section):
    """Which tokens which layers see."""

    enabled: Bool = Field(default=False, description="Switch for all that is below.")
    random_ltd: RandomLtdSection = Field(
        default=RandomLtdSection(), description="Random layer-wise token dropping."
    )


class DataEfficiencySection(Section):
    """The same quality from less data."""

    enabled: Bool = Field(default=False, description="Switch for all that is below.")
    seed: NonNegativeInt = Field(
        default=1234, description="Decides the order of samples and which tokens are dropped."
    )
    data_sampling: DataSamplingSection = Field(
        default=DataSamplingSection(), description="Which samples come when."
    )
    data_routing: DataRoutingSection = Field(
        default=DataRoutingSection(), description="Which tokens which layers see."
    )
    lr_schedule: RateSchedule = Field(
        default=RateSchedule(),
        description="A factor on the learning rate by what was consumed; with it, leave the "
        "scheduler constant.",
    )

    @model_validator(mode="after")
    def _switches_are_said(self) -> DataEfficiencySection:
        """Refuse a leaf that is on below a switch that nobody has set.

        DeepSpeed looks at leaves alone, so its configs often leave out the switches above.
        """
        for leaf, above in self._leaves():
            for name, section in above if leaf.enabled else ():
                if "enabled" not in section.model_fields_set:
                    raise ValueError(
                        f"{name}.enabled is not set, but something below it is switched on: write "
                        "true, or false to switch off all below it"
                    )
        sampling = self.data_sampling
        both = sampling.curriculum_learning.enabled and sampling.dynamic_batching.enabled
        if both and self.samples:
            raise ValueError(
                "curriculum_learning and dynamic_batching both decide which samples come when; "
                "enable one (a curriculum by length is dynamic_batching with "
                "sequence_picking_order seqlen)"
            )
        return self

    def _leaves(self) -> Iterator[tuple[Any, list[tuple[str, Section]]]]:
        sampling, routing = self.data_sampling, self.data_routing
        top: list[tuple[str, Section]] = [(PATH, self)]
        under = [*top, (f"{PATH}.data_sampling", sampling)]
        yield sampling.curriculum_learning, under
        yield sampling.dynamic_batching, under
        yield self.lr_schedule, top
        yield routing.random_ltd, [*top, (f"{PATH}.data_routing", routing)]

    @property
    def samples(self) -> bool:
        """Whether this package decides which samples come when."""
        return self.enabled and self.data_sampling.enabled

    @property
    def curriculum(self) -> CurriculumLearningSection | None:
        """The curriculum's section, if all switches above it are on."""
        section = self.data_sampling.curriculum_learning
        return section if self.samples and section.enabled else None

    @property
    def batching(self) -> DynamicBatchingSection | None:
        """The section of dynamic batching, if all switches above it are on."""
        section = self.data_sampling.dynamic_batching
        return section if self.samples and section.enabled else None

    @property
    def rate(self) -> RateSchedule | None:
        """The schedule of the rate, if it and the switch above it are on."""
        return self.lr_schedule if self.enabled and self.lr_schedule.enabled else None

    @property
    def dropping(self) -> RandomLtdSection | None:
        """The section of random-LTD, if all switches above it are on."""
        section = self.data_routing.random_ltd
        return section if self.enabled and self.data_routing.enabled and section.enabled else None
