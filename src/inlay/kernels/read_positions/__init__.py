"""Models with a pooled output compute their layers only at the positions that are read; `calls.py` says which and when.

calls.py     at the root: which calls, and what a trial cannot know
trial.py     which modules can skip what: found and proved on a copy of the model
probe.py     the batches that this is tried with
modules.py   the modules that can skip positions, and what they do in a forward
index.py     positions taken out of a tensor and put back
"""

from inlay.kernels.read_positions.calls import around, forget
from inlay.kernels.read_positions.modules import FEATURE, candidate, is_candidate

__all__ = ["FEATURE", "around", "candidate", "forget", "is_candidate"]
