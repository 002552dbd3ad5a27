"""Scores of a model, with or without adapters: metrics, generation, likelihood."""
