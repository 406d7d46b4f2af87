from drivetrain_compression.recipe.modifier import CompressionUnit as CompressionUnit
from drivetrain_compression.recipe.modifier import Modifier as Modifier
from drivetrain_compression.recipe.modifier import ModifierConfig as ModifierConfig
from drivetrain_compression.recipe.modifier import Place as Place
from drivetrain_compression.recipe.modifier import Progress as Progress
from drivetrain_compression.recipe.modifier import Target as Target
from drivetrain_compression.recipe.recipe import Recipe as Recipe
