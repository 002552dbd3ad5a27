"""Imports without garbage collection leave it as it was."""

from __future__ import annotations

import gc
import sys
import weakref
from types import ModuleType

import pytest

from inlay.cli.importing import importing


def test_nothing_is_collected_inside_and_what_is_there_stays_out_of_later_collections(monkeypatch):
    with importing():
        assert not gc.isenabled()
        made = [[] for _ in range(5_000)]
        monkeypatch.setitem(sys.modules, "newly_imported", ModuleType("newly_imported"))
    assert gc.isenabled()
    assert gc.get_freeze_count() >= len(made)


def test_garbage_of_an_earlier_run_is_not_kept():
    class Model:
        pass

    model = Model()
    model.itself = model
    gone = weakref.ref(model)
    del model
    with importing():
        import json  # noqa: F401
    gc.collect()
    assert gone() is None


def test_an_import_that_fails_leaves_collection_on():
    with pytest.raises(ModuleNotFoundError), importing():
        import nothing_of_this_name  # noqa: F401
    assert gc.isenabled()


def test_who_has_it_off_keeps_it_off():
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
