"""Everything that core and plugins agree on; plugins import from here.

Four rooms: ``plugin`` (what a plugin is, its sections and hooks), ``world`` (devices, axes,
collectives), ``state`` (parameters, buckets, homes, fragments) and ``loop`` (transforms, batches,
loaders, runners, reports). Names are imported when they are first used, so a light module may
import the light ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain.lazy import lazy_names

if TYPE_CHECKING:
    from drivetrain.contracts.loop.batch import ACCUMULATION as ACCUMULATION
    from drivetrain.contracts.loop.batch import GLOBAL as GLOBAL
    from drivetrain.contracts.loop.batch import LARGEST as LARGEST
    from drivetrain.contracts.loop.batch import MICRO as MICRO
    from drivetrain.contracts.loop.batch import Batch as Batch
    from drivetrain.contracts.loop.batch import solve_batch as solve_batch
    from drivetrain.contracts.loop.loading import LoaderRequest as LoaderRequest
    from drivetrain.contracts.loop.runner import Runner as Runner
    from drivetrain.contracts.loop.step_report import StepReport as StepReport
    from drivetrain.contracts.loop.transform import Partitionable as Partitionable
    from drivetrain.contracts.loop.transform import Phase as Phase
    from drivetrain.contracts.loop.transform import Transform as Transform
    from drivetrain.contracts.plugin.hookspecs import HOOKSPEC_VERSION as HOOKSPEC_VERSION
    from drivetrain.contracts.plugin.params import Betas as Betas
    from drivetrain.contracts.plugin.params import OptimizerParams as OptimizerParams
    from drivetrain.contracts.plugin.params import Params as Params
    from drivetrain.contracts.plugin.params import PerGroup as PerGroup
    from drivetrain.contracts.plugin.params import Two as Two
    from drivetrain.contracts.plugin.plugin import Conflict as Conflict
    from drivetrain.contracts.plugin.plugin import Plugin as Plugin
    from drivetrain.contracts.plugin.plugin import Problem as Problem
    from drivetrain.contracts.plugin.plugin import Sections as Sections
    from drivetrain.contracts.plugin.plugin import hookimpl as hookimpl
    from drivetrain.contracts.plugin.section import NO_EFFECT as NO_EFFECT
    from drivetrain.contracts.plugin.section import Bool as Bool
    from drivetrain.contracts.plugin.section import Float as Float
    from drivetrain.contracts.plugin.section import Int as Int
    from drivetrain.contracts.plugin.section import NonNegativeFloat as NonNegativeFloat
    from drivetrain.contracts.plugin.section import NonNegativeInt as NonNegativeInt
    from drivetrain.contracts.plugin.section import PathText as PathText
    from drivetrain.contracts.plugin.section import PositiveFloat as PositiveFloat
    from drivetrain.contracts.plugin.section import PositiveInt as PositiveInt
    from drivetrain.contracts.plugin.section import Scalar as Scalar
    from drivetrain.contracts.plugin.section import Section as Section
    from drivetrain.contracts.plugin.section import Share as Share
    from drivetrain.contracts.state.bucket import BucketSpec as BucketSpec
    from drivetrain.contracts.state.bucket import BucketView as BucketView
    from drivetrain.contracts.state.bucket import Hyper as Hyper
    from drivetrain.contracts.state.bucket import OptimizerPlan as OptimizerPlan
    from drivetrain.contracts.state.bucket import Segment as Segment
    from drivetrain.contracts.state.bucket import StateSpec as StateSpec
    from drivetrain.contracts.state.bucket import UpdateRule as UpdateRule
    from drivetrain.contracts.state.bucket import WrappedRule as WrappedRule
    from drivetrain.contracts.state.extra import StateReader as StateReader
    from drivetrain.contracts.state.extra import StateWriter as StateWriter
    from drivetrain.contracts.state.extra import is_plain as is_plain
    from drivetrain.contracts.state.extra import plain as plain
    from drivetrain.contracts.state.extra import tupled as tupled
    from drivetrain.contracts.state.fragment import Box as Box
    from drivetrain.contracts.state.fragment import Fragment as Fragment
    from drivetrain.contracts.state.fragment import interval_boxes as interval_boxes
    from drivetrain.contracts.state.fragment import placed_boxes as placed_boxes
    from drivetrain.contracts.state.home import ParameterHome as ParameterHome
    from drivetrain.contracts.state.home import Place as Place
    from drivetrain.contracts.state.home import StateHome as StateHome
    from drivetrain.contracts.state.home import version_of as version_of
    from drivetrain.contracts.state.home import write_master as write_master
    from drivetrain.contracts.state.model_states import GradientWatch as GradientWatch
    from drivetrain.contracts.state.model_states import ModelStates as ModelStates
    from drivetrain.contracts.state.parameters import ParameterHandle as ParameterHandle
    from drivetrain.contracts.state.parameters import ParameterInfo as ParameterInfo
    from drivetrain.contracts.state.parameters import ParameterTable as ParameterTable
    from drivetrain.contracts.state.parameters import Placement as Placement
    from drivetrain.contracts.world.accelerator import Accelerator as Accelerator
    from drivetrain.contracts.world.collective import Collective as Collective
    from drivetrain.contracts.world.collective import Kind as Kind
    from drivetrain.contracts.world.collective import Op as Op
    from drivetrain.contracts.world.collective import Purpose as Purpose
    from drivetrain.contracts.world.collective import Tag as Tag
    from drivetrain.contracts.world.collective import axis_name as axis_name
    from drivetrain.contracts.world.collective import is_float8 as is_float8
    from drivetrain.contracts.world.communicator import DONE as DONE
    from drivetrain.contracts.world.communicator import Communicator as Communicator
    from drivetrain.contracts.world.communicator import CommunicatorLayer as CommunicatorLayer
    from drivetrain.contracts.world.communicator import CommunicatorPhase as CommunicatorPhase
    from drivetrain.contracts.world.communicator import CommunicatorWrapper as CommunicatorWrapper
    from drivetrain.contracts.world.communicator import Handle as Handle
    from drivetrain.contracts.world.mesh_layout import ATOMS as ATOMS
    from drivetrain.contracts.world.mesh_layout import Atom as Atom
    from drivetrain.contracts.world.mesh_layout import Axis as Axis
    from drivetrain.contracts.world.mesh_layout import AxisRequest as AxisRequest
    from drivetrain.contracts.world.mesh_layout import Digit as Digit
    from drivetrain.contracts.world.mesh_layout import MeshLayout as MeshLayout
    from drivetrain.contracts.world.mesh_layout import NamedAxis as NamedAxis
    from drivetrain.contracts.world.mesh_layout import SplitAxis as SplitAxis
    from drivetrain.contracts.world.mesh_layout import SubAxis as SubAxis

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "loop.batch": "ACCUMULATION Batch GLOBAL LARGEST MICRO solve_batch",
        "loop.loading": "LoaderRequest",
        "loop.runner": "Runner",
        "loop.step_report": "StepReport",
        "loop.transform": "Partitionable Phase Transform",
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
        "state.model_states": "GradientWatch ModelStates",
        "state.parameters": "ParameterHandle ParameterInfo ParameterTable Placement",
        "world.accelerator": "Accelerator",
        "world.collective": "Collective Kind Op Purpose Tag axis_name is_float8",
        "world.communicator": "Communicator CommunicatorLayer CommunicatorPhase "
        "CommunicatorWrapper DONE Handle",
        "world.mesh_layout": "ATOMS Atom Axis AxisRequest Digit MeshLayout NamedAxis "
        "SplitAxis SubAxis",
    },
)
