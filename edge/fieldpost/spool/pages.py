"""The spool's file page by page: for rows to which no tree leads any more.

A damaged page of a tree hides whole ones behind it. Every row here has a checksum, so rows can be looked for by their
shape, wherever they lie. The layout is that of https://sqlite.org/fileformat2.html, sections 1.6 and 2.
"""

from __future__ import annotations

import mmap
import re
import zlib
from collections.abc import Iterator
from typing import Any

import msgspec

from ..reading import Reading

WIDTHS = (0, 1, 2, 3, 4, 6, 8, 8, 0, 0)
"""Bytes of a value by its serial type, below 12."""

MOST_BYTES = 64_000_000

# Header size, then NULL for the primary key, which is in the cell, then a serial type for each column.
_BATCH = re.compile(rb"[\x0b-\x11]\x00[\x01-\x06\x08\x09]{7}", re.DOTALL)
_SET_ASIDE = re.compile(rb"[\x07-\x0d]\x00[\x04-\x06](?=[\x0d-\xff])", re.DOTALL)
_KEY = re.compile(rb"(?:mark|route|manifest)/|heads|boot|clock|counts|eras", re.DOTALL)


class Pages:
    """A database as it lies in `content`, in pages of `size` bytes; numbers count from 1."""

    def __init__(self, content: bytes | mmap.mmap, size: int) -> None:
        self._content = content
        self._size = size

    def batches(self) -> Iterator[tuple[Any, ...]]:
        """What looks like a row of the table `batch`, with each place that it may have: its checksum must tell."""
        for start, values in self._found(_BATCH, columns=10, local=self._size - 35):
            for length in range(1, 10):
                yield (_varint_before(self._content, start, length), *values[1:])

    def refused(self) -> Iterator[tuple[Any, ...]]:
        """What is a row of the table `set_aside`, without its id."""
        for _, values in self._found(_SET_ASIDE, columns=6, local=self._size - 35):
            _, at_ms, route, reason, body, crc = values
            if isinstance(body, bytes) and zlib.crc32(body) == crc and _is_reading(body):
                yield at_ms, route, reason, body, crc

    def state(self) -> Iterator[tuple[Any, ...]]:
        """What looks like a row of the table `state`: its checksum must tell."""
        local = (self._size - 12) * 64 // 255 - 23
        for match in _KEY.finditer(self._content):
            for length in range(4, 9):
                start = match.start() - length
                if start >= 0 and self._content[start] == length and (row := self._record(start, 3, local)):
                    yield row

    def _found(self, shape: re.Pattern[bytes], columns: int, local: int) -> Iterator[tuple[int, tuple[Any, ...]]]:
        at = 0
        while match := shape.search(self._content, at):
            at = match.start() + 1
            if row := self._record(match.start(), columns, local):
                yield match.start(), row

    def _record(self, start: int, columns: int, local: int) -> tuple[Any, ...] | None:
        """The values of the record whose header begins at `start`, None where there is none."""
        try:
            size, at = _varint(self._content, start)
            types = []
            while at < start + size:
                type_, at = _varint(self._content, at)
                types.append(type_)
            if len(types) != columns or at != start + size or 10 in types or 11 in types:
                return None
            widths = [WIDTHS[t] if t < 12 else (t - 12) // 2 for t in types]
            if sum(widths) > MOST_BYTES:
                return None
            payload = self._payload(start, size + sum(widths), local)
            values, at = [], size
            for type_, width in zip(types, widths, strict=True):
                values.append(_value(type_, payload[at : at + width]))
                at += width
        except (IndexError, ValueError):
            return None
        return tuple(values)

    def _payload(self, start: int, total: int, local: int) -> bytes:
        """`total` bytes from `start` on: those in the page, then those in the chain of overflow pages."""
        if total <= local:
            return self._within_page(start, total)
        least = (self._size - 12) * 32 // 255 - 23
        here = least + (total - least) % (self._size - 4)
        here = here if here <= local else least
        parts = [self._within_page(start, here)]
        following = int.from_bytes(self._within_page(start + here, 4))
        left = total - here
        while left > 0:
            if not 0 < following <= len(self._content) // self._size:
                raise ValueError("the chain is broken")
            page = self._content[(following - 1) * self._size : following * self._size]
            parts.append(page[4 : 4 + left])
            left -= self._size - 4
            following = int.from_bytes(page[:4])
        return b"".join(parts)

    def _within_page(self, start: int, length: int) -> bytes:
        if start // self._size != (start + length - 1) // self._size or start + length > len(self._content):
            raise ValueError("beyond the page")
        return self._content[start : start + length]


def _varint(content: bytes | mmap.mmap, at: int) -> tuple[int, int]:
    """The number at a place, and where it ends; up to 9 bytes, the highest first."""
    value = 0
    for length in range(8):
        byte = content[at + length]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + length + 1
    return value << 8 | content[at + 8], at + 9


def _varint_before(content: bytes | mmap.mmap, end: int, length: int) -> int:
    """The number of so many bytes that ends at a place, -1 where there is none."""
    if end < length:
        return -1
    value, past = _varint(content, end - length)
    return value if past == end else -1


def _value(type_: int, data: bytes) -> int | str | bytes | None:
    if type_ == 0:
        return None
    if type_ < 7:
        return int.from_bytes(data, signed=True)
    if type_ < 12:
        return type_ - 8  # 0 and 1 have types of their own
    return data if type_ % 2 == 0 else data.decode()


def _is_reading(body: bytes) -> bool:
    try:
        msgspec.msgpack.decode(body, type=Reading)
    except msgspec.MsgspecError:
        return False
    return True
