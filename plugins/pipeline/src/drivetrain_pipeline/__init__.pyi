from drivetrain_pipeline.layers import LayerSpec as LayerSpec
from drivetrain_pipeline.layers import TiedLayerSpec as TiedLayerSpec
from drivetrain_pipeline.measuring import measure as measure
from drivetrain_pipeline.module import PipelineModule as PipelineModule
from drivetrain_pipeline.scripts import Evaluation as Evaluation
from drivetrain_pipeline.scripts import PipelineEngine as PipelineEngine
from drivetrain_pipeline.scripts import evaluate as evaluate
from drivetrain_pipeline.section import PipelineSection as PipelineSection
