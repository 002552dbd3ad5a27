"""The frozen model, read only: its layers, the places in it, how they are chosen, and what identifies it."""
