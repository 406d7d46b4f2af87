from drivetrain.engine.engine import Engine as Engine
from drivetrain.engine.loader import DataLoader as DataLoader
from drivetrain.engine.loader import RepeatingLoader as RepeatingLoader
