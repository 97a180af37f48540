"""Memory for the flag-in-value mailboxes and tile counters of a single-read kernel: all bits set when it starts.

Two regions take turns: a launch works in one and sets all bits of what the last launch left in the other. Launches of a
stream follow one another, so the region that a launch works in was restored by the one before it, and is restored by
the one after it; nothing is filled but new regions. They are a stream's own, and of a graph that is being captured its
own: each of its replays fills them first. Where Inductor makes the graphs (mode="reduce-overhead"), no memory may
outlive a run, so that every launch fills its own.
"""

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from onlinenorm.ops.fused.nvrtc import capture_of

ALIGNMENT = 256


@dataclass
class _Pair:
    """Two regions of equal size; all bits of the next one are set, and of the other one but for its first ``left``."""

    memory: Tensor
    capture: int
    next: int = 0
    left: int = 0

    @property
    def size(self) -> int:
        return self.memory.nbytes // 2

    def address(self, region: int) -> int:
        return self.memory.data_ptr() + region * self.size


_pairs: dict[tuple[int, int], _Pair] = {}
_largest: dict[int, int] = {}  # of a device's launches, in bytes
_queues: dict[tuple[int, int], threading.Lock] = {}


def with_messages(size: int, device: torch.device, stream: int, launch: Callable[[int, int, int], None]) -> None:
    """Call ``launch(address, clear, clear_bytes)``, which queues a kernel on ``stream``, the current one of ``device``.

    From ``address`` on, ``size`` bytes have all bits set when it starts; it sets all of ``clear_bytes`` from ``clear``.
    """
    size = -(-size // ALIGNMENT) * ALIGNMENT
    key = device.index, stream
    with _queues.setdefault(key, threading.Lock()):  # queued in the order in which they take turns
        pair = _pair(size, device, stream)
        if pair is None:
            memory = _filled(size, device)
            launch(memory.data_ptr(), 0, 0)
            return
        try:
            launch(pair.address(pair.next), pair.address(1 - pair.next), pair.left)
        except BaseException:  # whether it was queued is not known
            _pairs.pop(key, None)
            raise
        pair.next, pair.left = 1 - pair.next, size


def _pair(size: int, device: torch.device, stream: int) -> _Pair | None:
    """The stream's regions, of ``size`` bytes at least; None where none may be kept."""
    capture = capture_of(stream) if torch.cuda.is_current_stream_capturing() else 0
    pair = _pairs.get((device.index, stream))
    if pair is None or pair.capture != capture or pair.size < size:
        pair = None  # gone before the next is taken
        _pairs.pop((device.index, stream), None)
        if _inductor_makes_graphs_on(device, stream):
            return None
        _largest[device.index] = size = max(size, _largest.get(device.index, 0))
        _pairs[device.index, stream] = pair = _Pair(_filled(2 * size, device), capture)
    return pair


def _filled(size: int, device: torch.device) -> Tensor:
    return torch.empty(size // 8, dtype=torch.int64, device=device).fill_(-1)


def _inductor_makes_graphs_on(device: torch.device, stream: int) -> bool:
    """Whether ``stream`` is that of Inductor's CUDA-graph trees, in warm-up as in capture.

    Either refuses memory that lives on in its pool, as regions would.
    """
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is None:
        return False
    try:
        manager = trees.get_manager(device.index, create_if_none_exists=False)
    except AssertionError:  # torch 2.11, in a thread that has compiled nothing
        return False
    return manager is not None and manager.stream.cuda_stream == stream
