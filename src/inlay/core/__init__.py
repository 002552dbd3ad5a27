"""The core: what a method builds, what the model is, and how the one is put into the other.

    model/       the frozen model, read only
    contracts/   what a method's author reads and writes
    forward/     which rows of a forward go through what
    prompts/     virtual positions
    beside them  the life cycle: build, install, attach, merge, and what they need

Each imports those above it only; `tests/unit/test_imports.py` holds it.
"""
