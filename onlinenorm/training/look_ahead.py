"""Batches of one of several processes, looked at so early that all can stop, and save, before one that has failed."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from onlinenorm.data.prefetch import Batch
from onlinenorm.errors import DataError
from onlinenorm.training.interruption import StopSignals

STEPS = 2  # a flag that is sent at the end of one step is acted upon at the end of the next


class LookAhead:
    """A loader's batches, each checked before those of the two steps in front of it are used.

    A process without a batch cannot take part in a step, in which the others wait for it. So what fails, as an image
    that cannot be read does, is left with `stop`, which all processes look at after each step: they end together, with
    that error, after the last step that all have images for. What fails at once ends them before the first.

    Args:
        loader: of this process; the others' have as many batches.
        check: makes a batch of one; raises DataError where it cannot be used.
        accumulate: batches of a step.
        stop: of this process.
    """

    def __init__(self, loader: Any, check: Callable[[Batch], Batch], accumulate: int, stop: StopSignals):
        self.loader, self.check, self.ahead, self.stop = loader, check, STEPS * accumulate, stop
        self.dataset, self.batch_sampler, self.num_workers = loader.dataset, loader.batch_sampler, loader.num_workers

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        checked = self._checked()
        waiting = deque(itertools.islice(checked, self.ahead))
        self.stop.raise_failure()
        for batch in checked:
            waiting.append(batch)
            yield waiting.popleft()
        yield from waiting
        if self.stop.failure is not None:  # the others have not agreed to stop
            raise self.stop.failure

    def _checked(self) -> Iterator[Batch]:
        try:
            yield from map(self.check, self.loader)
        except DataError as error:
            self.stop.failure = error
