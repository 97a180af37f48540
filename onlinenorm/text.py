"""Words that messages and pages share."""


def duration(seconds: float) -> str:
    """12 as "12 s", 90 as "1 min 30 s", 3900 as "1 h 5 min"; less than nothing counts as nothing."""
    hours, rest = divmod(round(max(seconds, 0.0)), 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {secs} s" if minutes else f"{secs} s"


def plural(count: int, noun: str) -> str:
    """1 and "epoch" as "1 epoch", 1200 as "1,200 epochs"."""
    return f"{count:,} {noun}" + "s" * (count != 1)


def first_line(error: BaseException) -> str:
    """Of an error's message, or the name of its class where it has none; what follows is advice to programmers."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
