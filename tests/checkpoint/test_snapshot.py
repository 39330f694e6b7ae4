"""Copies for a save in the background, and the thread that writes them."""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from harness.checkpoint.save import STEP_BACK, step_back
from harness.checkpoint.snapshot import Snapshots, storage_sizes


def test_a_copy_uses_the_memory_that_was_reserved_for_it() -> None:
    flat = torch.randn(1000)
    tree = {"flat": flat, "parts": [flat[:10], flat[990:]], "other": torch.ones(3), "none": None}
    assert sorted(storage_sizes(tree)) == [12, 4000]
    snapshots = Snapshots()
    snapshots.reserve(storage_sizes(tree))
    reserved = {buffer.data_ptr() for buffer in snapshots._buffers}
    copy = snapshots.take(tree)
    assert {copy["flat"].data_ptr(), copy["other"].data_ptr()} == reserved
    assert torch.equal(copy["parts"][1], flat[990:])
    assert copy["parts"][0].data_ptr() == copy["flat"].data_ptr()
    snapshots.reserve([4000])  # too late
    assert {buffer.data_ptr() for buffer in snapshots._buffers} == reserved


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_what_writes_in_the_background_steps_back_for_training() -> None:
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = priority()
    with ThreadPoolExecutor(1, initializer=step_back) as thread:
        assert thread.submit(priority).result() == min(before + STEP_BACK, 19)
    assert priority() == before
