"""Everything that core and plugins agree on; plugins import from here.

Four rooms: ``plugin`` (what a plugin is, its sections and hooks), ``world`` (devices, axes,
collectives), ``state`` (parameters, buckets, homes, fragments) and ``loop`` (transforms, batches,
loaders, runners, reports). Names are imported when they are first used, so a light module may
import the light ones.
"""

from __future__ import annotations

from drivetrain.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "loop.attention": "Attention AttentionFacts AttentionLayer AttentionPhase MaskRule",
        "loop.batch": "ACCUMULATION Batch GLOBAL LARGEST MICRO solve_batch",
        "loop.inference": (
            "Adapts Completion Embeds Generates InferenceRequest Progress Serves TokenLogprobs"
        ),
        "loop.loading": "Finish LoaderRequest SampleOrder",
        "loop.message": "SentInParts",
        "loop.runner": "Runner",
        "loop.step_report": "StepReport",
        "loop.transform": "Phase Transform",
        "plugin.hookspecs": "HOOKSPEC_VERSION",
        "plugin.params": "Betas OptimizerParams Params PerGroup Two",
        "plugin.plugin": "Conflict Plugin Problem Sections hookimpl",
        "plugin.section": "Bool Float Int NO_EFFECT NonNegativeFloat NonNegativeInt "
        "PathText PositiveFloat PositiveInt Scalar Section Share",
        "state.bucket": "BucketSpec BucketView Hyper OptimizerPlan Segment "
        "StateSpec UpdateRule WrappedRule",
        "state.extra": "StateReader StateWriter is_plain plain tupled",
        "state.fragment": "Box Fragment interval_boxes placed_boxes",
        "state.home": "ParameterHome Place StateHome version_of write_master",
        "state.model_states": "GradientFilter GradientNorm GradientWatch ModelStates",
        "state.parameters": "ParameterHandle ParameterInfo ParameterTable Placement",
        "state.weight_format": "Packed WeightFormat",
        "world.accelerator": "Accelerator",
        "world.axis": "ATOMS Atom Axis AxisRequest NamedAxis SplitAxis SubAxis",
        "world.collective": "Collective Kind Op Purpose Tag axis_name is_float8",
        "world.communicator": "Communicator CommunicatorLayer CommunicatorPhase "
        "CommunicatorWrapper DONE Handle is_first_copy",
    },
)
