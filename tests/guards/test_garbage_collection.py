"""Garbage is collected by all ranks at the same step, and not while libraries are imported."""

from __future__ import annotations

import gc
import importlib
import sys
import weakref

import pytest
import tiny_run

from retemper.engine import pretrain
from retemper.engine.guards.garbage_collection import GarbageCollection, without_gc


class Cycle:
    """Garbage that only the collector can free."""

    def __init__(self):
        self.itself = self


def _garbage() -> weakref.ref:
    return weakref.ref(Cycle())


def test_garbage_is_collected_at_its_steps_only():
    with GarbageCollection(3) as schedule:
        assert not gc.isenabled()
        found = []
        for step in range(1, 7):
            garbage = _garbage()
            schedule.step_done(step)
            found.append(garbage() is None)
    assert found == [False, False, True, False, False, True]
    assert gc.isenabled()


def test_the_collector_is_restored_after_an_error_and_left_as_it_was():
    with pytest.raises(RuntimeError), GarbageCollection(1):
        raise RuntimeError
    assert gc.isenabled()
    with GarbageCollection(0):
        assert gc.isenabled()
    gc.disable()
    try:
        with GarbageCollection(1):
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_run_collects_as_configured(one_rank, run_file, tmp_path, monkeypatch):
    collected, enabled = [], []
    monkeypatch.setattr(GarbageCollection, "step_done", lambda self, number: collected.append(number))
    config = tiny_run.configure(run_file, "--run_folder", str(tmp_path), "--training.train_tokens", "1024")
    run = pretrain.build(config, one_rank)
    tiny_run.before_step(run, lambda: enabled.append(gc.isenabled()))
    pretrain.train(run)
    assert collected == [1, 2, 3, 4]
    assert enabled == [False] * 4
    assert gc.isenabled()


def test_the_collector_rests_while_libraries_are_imported(tmp_path, monkeypatch):
    assert gc.isenabled()
    frozen = gc.get_freeze_count()
    with pytest.raises(ImportError), without_gc():
        assert not gc.isenabled()
        raise ImportError
    with without_gc():  # everything has been imported before
        import torch  # noqa: F401
    assert gc.isenabled() and gc.get_freeze_count() == frozen
    (tmp_path / "library_of_startup.py").write_text("loop = []\nloop.append(loop)\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with without_gc():
            importlib.import_module("library_of_startup")
        assert gc.isenabled() and gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()
        del sys.modules["library_of_startup"]
