"""Layers of a model whose output is pooled, computed at the positions that are read: `calls.py` says which and when.

calls.py     the root: which calls, and what a trial cannot say
trial.py     what may be left out, looked for and proved on a copy
probe.py     the rows that this is tried on
modules.py   the candidates, and what they do in a forward
index.py     positions taken out of a tensor and put back
"""

from inlay.kernels.read_positions.calls import around, forget
from inlay.kernels.read_positions.modules import FEATURE, candidate, is_candidate

__all__ = ["FEATURE", "around", "candidate", "forget", "is_candidate"]
