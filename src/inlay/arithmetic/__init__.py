"""Arithmetic of adapters: weighted sums, compressed, merged with less interference, negated.

combining.py   `combine`: several adapters of a model to a new one, and what the approximation cost
effects.py     what an adapter does to each weight, as factors or as a dense change
numbers.py     sums in a method's own numbers, where its effect is linear in them
differences.py sums of differences to other parameters or entries, as one sparse difference
low_rank.py    concatenation, and compression by QR of the factors
sparse.py      TIES, DARE, pruning by magnitude
report.py      the error at each site
"""

from inlay.arithmetic.combining import combine
from inlay.arithmetic.report import CombineReport, SiteError

__all__ = ["CombineReport", "SiteError", "combine"]
