"""The process's garbage collector."""

from __future__ import annotations

import gc

import pytest

from proxy.server import process


def test_the_collector_rests_for_as_long_as_the_work_takes() -> None:
    with process.no_garbage_collection():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ValueError, match="bad"), process.no_garbage_collection():
        raise ValueError("bad")
    assert gc.isenabled()
