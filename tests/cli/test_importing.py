"""Imports without garbage collection leave it as it was."""

from __future__ import annotations

import gc

import pytest

from inlay.cli.importing import importing


def test_nothing_is_collected_inside_and_what_is_there_stays_out_of_later_collections():
    with importing():
        assert not gc.isenabled()
        made = [[] for _ in range(5_000)]
    assert gc.isenabled()
    assert gc.get_freeze_count() >= len(made)


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
