"""Arithmetic of adapters: weighted sums, compression, merging with less interference, negation.

combining.py   `combine`: several adapters of a model into a new one, and the error of the approximation
effects.py     what an adapter does to each weight, as factors or as a dense change
numbers.py     sums of a method's own parameters, if its effect is linear in them
differences.py sums of differences to other parameters or entries, as one sparse difference
low_rank.py    concatenation, and compression by QR of the factors
sparse.py      TIES, DARE, pruning by magnitude
report.py      the error at each site
"""

from inlay.arithmetic.combining import combine
from inlay.arithmetic.report import CombineReport, SiteError

__all__ = ["CombineReport", "SiteError", "combine"]
