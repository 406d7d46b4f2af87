from drivetrain_sequence.heads import HeadShare as HeadShare
from drivetrain_sequence.heads import from_heads as from_heads
from drivetrain_sequence.heads import to_heads as to_heads
from drivetrain_sequence.layout import Cut as Cut
from drivetrain_sequence.losses import mean_over_sequence as mean_over_sequence
from drivetrain_sequence.losses import token_losses as token_losses
from drivetrain_sequence.section import SequenceParallelSection as SequenceParallelSection
from drivetrain_sequence.tiles import in_tiles as in_tiles
