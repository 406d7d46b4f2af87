"""Saving and loading: one directory a tag, tensors in safetensors, everything else in JSON.

``<save_dir>/<tag>/`` holds ``manifest.json`` (counters, schedule, client state, the list of files
with their checksums) and for every rank ``rank00000.safetensors`` with an index
``rank00000.json``. ``<save_dir>/latest`` names the newest tag. A checkpoint is written aside and
renamed when every rank has finished, so a tag that exists is whole.
"""

from drivetrain.checkpoint.load import load
from drivetrain.checkpoint.save import save
from drivetrain.checkpoint.state import StateReader, StateWriter

__all__ = ["StateReader", "StateWriter", "load", "save"]
