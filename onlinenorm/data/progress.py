"""How far a long preparation is, for people who wait."""

import sys
import time

from onlinenorm.text import duration


class Progress:
    """A line a step: how much is done, at what rate, how long it will take; printed every `interval` seconds."""

    def __init__(self, interval: float | None = None):
        self.interval = (1.0 if sys.stderr.isatty() else 30.0) if interval is None else interval
        self._what, self._start, self._first, self._printed = "", 0.0, 0, 0.0

    def __call__(self, what: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._start, self._first, self._printed = what, now, done, now
        elif now - self._printed >= self.interval or done == total:
            self._printed = now
            rate = (done - self._first) / max(now - self._start, 1e-9)
            text = f"{what}: {done:,}" + (f" of {total:,} ({done / max(total, 1):.1%})" if total else "")
            if rate > 0:
                text += f", {rate:,.0f}/s" + (f", {duration((total - done) / rate)} to go" if total else "")
            end = "\n" if not sys.stderr.isatty() or done == total else "\r"
            print(text.ljust(79), end=end, file=sys.stderr, flush=True)
