"""Measurements: against the peers (alternately, in one process) and on real data; results go to `runs/`."""
