"""Batches made ahead on a stream of their own, in a thread beside the one that trains."""

import collections
import queue
import threading
from collections.abc import Generator, Iterable, Sequence
from typing import TypeVar

import torch

Batch = tuple[torch.Tensor, ...]
Item = TypeVar("Item", bound=tuple)

THREAD = "prefetch"
_QUEUE = 2  # batches that wait for the training step

_idle: dict[tuple[torch.device, str], list[torch.cuda.Stream]] = collections.defaultdict(list)


def prefetch(batches: Iterable[Item], device: torch.device, work: str = "batches") -> Generator[Item, None, None]:
    """The batches in their order; their work on a GPU overlaps with that of whoever takes them.

    ``work`` is what making them is: streams, and the memory they keep, go from one thread to the next of the same work.
    A batch is a tuple; memory of its tensors on the GPU is not used again before the taker's stream has read them.

    An error within `batches` is raised here. Leaving early ends the thread.
    """
    results: queue.Queue = queue.Queue(_QUEUE)
    stopped = threading.Event()
    begun = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
    worker = threading.Thread(
        target=_produce, args=(batches, device, work, begun, results, stopped), name=THREAD, daemon=True
    )
    worker.start()
    try:
        while (item := results.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            batch, ready = item
            if ready is not None:
                stream = torch.cuda.current_stream(device)
                stream.wait_event(ready)
                for tensor in batch:
                    if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
                        tensor.record_stream(stream)
            yield batch
    finally:
        stopped.set()
        while worker.is_alive():  # it may wait for room
            _drain(results)
            worker.join(0.05)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`, copied from pinned memory where that is a GPU, so that nothing waits for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def transfer_rest(rest: Sequence[torch.Tensor], device: torch.device) -> Batch:
    """Of (labels, indices, colour shifts or nothing) all but the indices on `device`.

    Those stay in host memory, where they are looked at, pinned for the step that copies them.
    """
    labels, indices, *colour = rest
    if device.type == "cuda":
        indices = indices.pin_memory()
    return (to_device(labels, device), indices, *(to_device(shifts, device) for shifts in colour))


def _produce(
    batches: Iterable[tuple],
    device: torch.device,
    work: str,
    begun: torch.cuda.Event | None,
    results: queue.Queue,
    stopped: threading.Event,
) -> None:
    stream = None if begun is None else _take_stream(device, work)
    try:
        with torch.cuda.stream(stream):
            if stream is not None and begun is not None:
                stream.wait_event(begun)  # for what the batches are made of
            for batch in batches:
                if stopped.is_set():
                    return
                results.put((batch, None if stream is None else stream.record_event()))
        results.put(None)
    except BaseException as error:  # raised in the thread that waits
        results.put(error)
    finally:
        if stream is not None:
            _idle[device, work].append(stream)


def _take_stream(device: torch.device, work: str) -> torch.cuda.Stream:
    """A stream that no other thread uses: a former one where there is one, as its memory serves no other stream.

    Its kernels are few and go first, that batches are there in time.
    """
    try:
        return _idle[device, work].pop()
    except IndexError:
        return torch.cuda.Stream(device, priority=-1)


def _drain(results: queue.Queue) -> None:
    try:
        while True:
            results.get_nowait()
    except queue.Empty:
        return
