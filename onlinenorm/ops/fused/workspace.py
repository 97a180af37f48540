"""Memory for the flag-in-value mailboxes and tile counters of a single-read kernel: all bits set, for one launch only.

Filling it anew for every launch would cost a kernel each. Small launches of one stream take consecutive pieces of a
chunk that was filled at once; a large one fills its own, which goes back as soon as it is queued. A chunk filled while
a graph is captured serves that graph only, because only its replays fill it again; where Inductor makes the graphs
(mode="reduce-overhead"), no chunk may outlive a run, so that every launch fills its own.
"""

import sys
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from onlinenorm.ops.fused.nvrtc import capture_of

CHUNK = 2 * 2**20  # bytes
LARGE = CHUNK // 2
ALIGNMENT = 256


@dataclass
class _Chunk:
    memory: Tensor
    capture: int
    used: int = 0


_chunks: dict[tuple[int, int], _Chunk] = {}
_lock = threading.Lock()


def empty(size: int, device: torch.device, stream: int) -> tuple[int, Tensor]:
    """Address of ``size`` bytes with all bits set, for the next launch on ``stream``, the current one of ``device``.

    The tensor is what holds them: keep it until the launch is queued.
    """
    size = -(-size // ALIGNMENT) * ALIGNMENT
    if size > LARGE:
        memory = _filled(size, device)
        return memory.data_ptr(), memory
    capture = capture_of(stream) if torch.cuda.is_current_stream_capturing() else 0
    key = device.index, stream
    with _lock:
        chunk = _chunks.get(key)
        if chunk is None or chunk.capture != capture or chunk.used + size > chunk.memory.nbytes:
            chunk = None  # gone before the next is taken
            _chunks.pop(key, None)
            if _inductor_makes_graphs_on(device, stream):
                memory = _filled(size, device)
                return memory.data_ptr(), memory
            _chunks[key] = chunk = _Chunk(_filled(CHUNK, device), capture)
        address = chunk.memory.data_ptr() + chunk.used
        chunk.used += size
    return address, chunk.memory


def _filled(size: int, device: torch.device) -> Tensor:
    return torch.empty(size // 8, dtype=torch.int64, device=device).fill_(-1)


def _inductor_makes_graphs_on(device: torch.device, stream: int) -> bool:
    """Whether ``stream`` is that of Inductor's CUDA-graph trees, in warm-up as in capture.

    Either refuses memory that lives on in its pool, as a chunk would.
    """
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is None:
        return False
    try:
        manager = trees.get_manager(device.index, create_if_none_exists=False)
    except AssertionError:  # torch 2.11, in a thread that has compiled nothing
        return False
    return manager is not None and manager.stream.cuda_stream == stream
