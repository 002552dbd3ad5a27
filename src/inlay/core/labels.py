"""The label of a position that is not trained on."""

IGNORED = -100  # the number that torch and transformers use
