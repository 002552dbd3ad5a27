"""Every method on four tasks of real data: one command, three seeds, resumable."""
