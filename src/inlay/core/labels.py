"""What a label says that is none."""

IGNORED = -100  # of a position that is not learnt: torch's and transformers' own number
