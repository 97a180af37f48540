"""Messages of the single-read kernels: whose memory they lie in, and that no launch meets those of another."""

import ctypes
import random
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from onlinenorm.ops.fused import workspace


@pytest.fixture
def turns(monkeypatch):
    """Launches that check and use the memory they are given, on the CPU."""
    for name in ("_pairs", "_largest", "_queues"):
        monkeypatch.setattr(workspace, name, {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    fills = []
    filled = workspace._filled
    monkeypatch.setattr(workspace, "_filled", lambda size, device: fills.append(size) or filled(size, device))

    def launch(size, stream=7, fails=False):
        def queue(address, clear, clear_bytes):
            messages = (ctypes.c_char * size).from_address(address)
            assert messages.raw == b"\xff" * size, "messages of another launch"
            assert not clear_bytes or clear + clear_bytes <= address or address + size <= clear
            ctypes.memset(address, 0, size)
            ctypes.memset(clear, 0xFF, clear_bytes)
            if fails:
                raise RuntimeError("refused")

        workspace.with_messages(size, torch.device("cpu", 0), stream, queue)

    return launch, fills


def test_launches_that_take_turns_find_no_messages_of_one_another(turns, monkeypatch):
    """Whatever their sizes and order, on several streams, while graphs are captured, and where a launch fails."""
    (launch, fills), rng, capture = turns, random.Random(0), [0]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capture[0] > 0)
    monkeypatch.setattr(workspace, "capture_of", lambda stream: capture[0])
    for _ in range(2000):
        if rng.random() < 0.02:
            capture[0] = rng.choice([0, capture[0] + 1])
        if rng.random() < 0.01:
            with pytest.raises(RuntimeError, match="refused"):
                launch(rng.randint(1, 5000), fails=True)
        launch(rng.choice([16, 300, 4096, 5000]), stream=rng.choice([7, 8]))
    fills.clear()
    for _ in range(100):
        launch(4096)
    assert len(fills) <= 1  # new regions at most


def test_regions_are_as_large_as_the_largest_launch_of_the_device(turns):
    launch, fills = turns
    for size in (1000, 500, 3000, 1000, 3000, 200):
        launch(size)
    assert fills == [2 * 1024, 2 * 3072]
    launch(100, stream=9)
    assert fills[2:] == [2 * 3072]


def test_no_region_outlives_a_run_of_inductors_graphs(turns, monkeypatch):
    """Their pool refuses it: every launch there fills its own. Other streams are served as ever."""
    launch, fills = turns
    manager = SimpleNamespace(stream=SimpleNamespace(cuda_stream=7))
    trees = SimpleNamespace(get_manager=lambda index, create_if_none_exists: manager)
    monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", trees)
    for _ in range(3):
        launch(1000)
    assert fills == [1024] * 3 and not workspace._pairs
    launch(1000, stream=8)
    assert list(workspace._pairs) == [(0, 8)]
