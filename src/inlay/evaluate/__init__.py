"""Evaluating a model, with or without adapters: metrics, generation, likelihood.

run.py          `evaluate`: the metrics that suit a data set, from one call
generate.py     texts from prompts
likelihood.py   negative log-likelihood (in nats) of given texts; the most probable label
heads.py        outputs of classification and regression heads
labels.py       labels as text
metrics.py      scores of predictions against references
batches.py      from rows to padded batches
progress.py     reporting progress
"""
