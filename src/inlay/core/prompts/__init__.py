"""Virtual positions: how prompts enter a model, attend, and never show."""
