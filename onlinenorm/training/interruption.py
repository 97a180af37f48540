"""SIGTERM and SIGUSR1: the handler sets a flag, all processes agree at a step boundary, save together and leave."""

import signal

import torch
import torch.distributed as dist

from onlinenorm.training.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Context in which the signals only set `signum`; the former handlers come back at its end."""

    def __init__(self):
        self.signum = 0
        self._former: dict[int, object] = {}
        self._group = None
        self._pending: tuple[object, torch.Tensor] | None = None

    def __enter__(self) -> "StopSignals":
        self._former = {number: signal.getsignal(number) for number in SIGNALS}
        self.install()
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Sets the handlers."""
        for number in SIGNALS:
            signal.signal(number, self._remember)

    def _remember(self, signum: int, frame) -> None:
        self.signum = signum

    def agreed(self, trainer) -> bool:
        """Whether to stop at this step; the same answer on every process. To be called by all, once a step.

        Across processes the flags of one step are exchanged in the background, on the CPU, and looked at in the next:
        no step waits for the exchange, and all act on the same step.
        """
        if trainer.world_size == 1:
            return self.signum != 0
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        seen = 0
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            seen = int(flag)
        flag = torch.tensor(self.signum)
        self._pending = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True), flag
        self.signum = self.signum or seen
        return seen != 0

    def leave(self, epoch: int, step: int) -> None:
        """Raises Interrupted."""
        name = signal.Signals(self.signum).name
        where = f"step {step} of epoch {epoch + 1}" if step else f"the end of epoch {epoch}"
        raise Interrupted(f"{name}: saved at {where}; the same command continues from there", self.signum)
