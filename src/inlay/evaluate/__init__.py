"""Scores of a model, with or without adapters: metrics, generation, likelihood.

run.py          `evaluate`: the metrics that suit a data set, from one call
generate.py     texts from prompts
likelihood.py   summed nats of given texts; the most probable label
heads.py        outputs of classification and regression heads
labels.py       labels as text
metrics.py      predictions against references
batches.py      rows into padded batches
progress.py     how far a stage is
"""
