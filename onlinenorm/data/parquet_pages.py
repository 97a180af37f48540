"""Where the values of a column of byte strings lie in a Parquet file, so that one is read without its row group.

A row group of photographs holds a hundred of them in one compressed page, 11 MB: read whole for each image in a
shuffled order it would be a hundred times too much. Photographs hardly shrink, and Snappy, which is what these files
are compressed with, works on pieces of 64 KB that stand for themselves. What has to be read of an image is then the two
or three pieces that it touches.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

_PIECE = 1 << 16  # bytes of a piece of Snappy before compression
_PREFIX = 64  # bytes by which a value is searched


class NotReadInPlace(ValueError):
    """A file that is whole, and written in a way that is not read here."""


class Place(NamedTuple):
    """A value in a file.

    start, stored: first byte and number of bytes to read. room: bytes that they decompress to, 0 where they are the
    value itself. skip: bytes before the value among those.
    """

    start: int
    stored: int
    room: int
    skip: int


class Page(NamedTuple):
    """Values as they are before compression.

    pieces: (position in `data`, position in the file) where decompression can begin, and the end of both.
    """

    data: bytes
    pieces: list[tuple[int, int]]
    compressed: bool


def locate(values: Iterable[bytes], pages: list[Page]) -> Iterator[Place]:
    """Where each value lies, given the pages of its column chunk; NotReadInPlace where one is not there in one part."""
    number, position = 0, 0  # values mostly follow each other; a dictionary's are repeated
    for value in values:
        tries = ((number, position), *((n, 0) for n in range(number, len(pages))), *((n, 0) for n in range(number)))
        found = next(((n, at) for n, begin in tries if (at := _find(pages[n].data, value, begin)) >= 0), None)
        if found is None:
            raise NotReadInPlace("its values are encoded in an uncommon way")
        number, at = found
        position = at + len(value)
        yield _place(pages[number], at, len(value))


def read_pages(chunk: bytes, start: int, codec: str, decompress: Callable[[bytes, int], bytes]) -> Iterator[Page]:
    """The pages of a column chunk.

    Args:
        chunk: its bytes.
        start: of it in the file.
        codec: "snappy", another, or "" where nothing is compressed.
        decompress: (compressed, size of the result) -> the result.

    Raises ValueError where that is none.
    """
    at = 0
    while at < len(chunk):
        header, at = _read_struct(chunk, at)
        room, stored = header[2], header[3]
        second = header.get(8, {})  # of the second version of data pages, whose levels are not compressed
        levels = second.get(5, 0) + second.get(6, 0)
        begin, end = at + levels, at + stored
        if end > len(chunk):
            raise ValueError("a page ends behind its column")
        if codec and second.get(7, True) and begin < end:
            data = decompress(chunk[begin:end], room - levels)
            pieces = (
                _snappy_pieces(chunk[begin:end], len(data)) if codec == "snappy" else [(0, 0), (len(data), end - begin)]
            )
            yield Page(data, [(out, start + begin + place) for out, place in pieces], True)
        else:
            yield Page(chunk[begin:end], [(0, start + begin), (end - begin, start + end)], False)
        at = end


def _find(data: bytes, value: bytes, begin: int) -> int:
    at = data.find(value[:_PREFIX], begin)
    while at >= 0 and not data.startswith(value, at):
        at = data.find(value[:_PREFIX], at + 1)
    return at


def _place(page: Page, at: int, length: int) -> Place:
    if not page.compressed:
        return Place(page.pieces[0][1] + at, length, 0, 0)
    first = bisect_right(page.pieces, at, key=lambda piece: piece[0]) - 1
    last = next(n for n in range(first, len(page.pieces)) if page.pieces[n][0] >= at + length)
    (begin, start), (end, stop) = page.pieces[first], page.pieces[last]
    return Place(start, stop - start, end - begin, at - begin)


def _snappy_pieces(data: bytes, size: int) -> list[tuple[int, int]]:
    """(position before compression, position in `data`) of the pieces and of the end; one where they hang together."""
    _, at = _read_varint(data, 0)
    body = at
    pieces, out = [(0, at)], 0
    while at < len(data):
        tag = data[at]
        if tag & 3 == 0:  # bytes as they are
            extra = max((tag >> 2) - 59, 0)
            length = 1 + (int.from_bytes(data[at + 1 : at + 1 + extra], "little") if extra else tag >> 2)
            at += 1 + extra + length
        else:  # a copy of `length` bytes, from `back` bytes before
            if tag & 3 == 1:
                length, back, more = 4 + (tag >> 2 & 7), (tag >> 5) << 8 | data[at + 1], 1
            else:
                more = 2 if tag & 3 == 2 else 4
                length, back = 1 + (tag >> 2), int.from_bytes(data[at + 1 : at + 1 + more], "little")
            if back > out - pieces[-1][0]:
                return [(0, body), (size, len(data))]
            at += 1 + more
        out += length
        if out - pieces[-1][0] >= _PIECE or at >= len(data):
            pieces.append((out, at))
    return pieces


def snappy_stream(pieces: bytes, room: int) -> bytes:
    """Pieces that decompress to `room` bytes, as a stream of their own."""
    length = bytearray()
    while room >= 128:
        length.append(room & 127 | 128)
        room >>= 7
    return bytes([*length, room]) + pieces


# Thrift's compact protocol, in which pages' headers are written


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _read_struct(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """(number of a field -> its value, where the struct ends); ValueError where there is none."""
    fields: dict[int, Any] = {}
    number = 0
    try:
        while data[at]:
            kind, delta = data[at] & 15, data[at] >> 4
            at += 1
            if delta:
                number += delta
            else:
                raw, at = _read_varint(data, at)
                number = _signed(raw)
            fields[number], at = _read_value(data, at, kind)
    except IndexError:
        raise ValueError("a page's header is cut short") from None
    return fields, at + 1


def _read_value(data: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind in (1, 2):
        return kind == 1, at
    if kind in (4, 5, 6):
        raw, at = _read_varint(data, at)
        return _signed(raw), at
    if kind == 8:
        length, at = _read_varint(data, at)
        return data[at : at + length], at + length
    if kind == 12:
        return _read_struct(data, at)
    raise ValueError(f"a page's header holds a field of type {kind}")


def _signed(raw: int) -> int:
    return raw >> 1 ^ -(raw & 1)
