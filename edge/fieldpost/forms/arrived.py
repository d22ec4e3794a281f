"""A row as somebody upstream sees it, whatever form it travelled in."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

from ..errors import Malformed
from ..reading import Event, Quality

MAX_BYTES = 64 * 1024 * 1024

ZLIB = b"\x78"
"""How its streams begin (RFC 1950); none of our forms begins so."""

QUALITIES = {
    Quality.SYNCED: "synced",
    Quality.ANCHORED: "anchored",
    Quality.BOUNDED: "bounded",
    Quality.UNSYNCED: "unsynced",
    Quality.CORRECTED: "corrected",
}
"""What a date rests on, as every form says it."""


@dataclass(slots=True)
class Arrived:
    """A row as somebody upstream sees it. `values` by channel: (value or reason of failure, unit)."""

    node: str
    install: str
    boot: int
    seq: int
    time_s: float
    error_s: float
    values: dict[str, tuple[float | str, str]] = field(default_factory=dict)
    event: Event | None = None
    quality: str = "synced"
    lane: str = ""

    @property
    def id(self) -> str:
        """The identity as one word, the same in every repeat."""
        return f"{self.node}.{self.install}.{self.boot}.{self.seq}"


def unpacked(body: bytes) -> bytes:
    """A message's body, zlib'd or plain. Raises Malformed where it is neither, or too large."""
    if body[:1] != ZLIB:
        return body
    try:
        unpacker = zlib.decompressobj()
        plain = unpacker.decompress(body, MAX_BYTES)
    except zlib.error as error:
        raise Malformed("form", str(error)) from None
    if unpacker.unconsumed_tail:
        raise Malformed("size", f"more than {MAX_BYTES} bytes")
    return plain
