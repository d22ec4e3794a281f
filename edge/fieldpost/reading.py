"""A reading: what one node measured at one moment, and the few values that travel with it.

Its identity `(node, install, boot, seq)` stays the same from the sensor to the upstream message. What the
gateway itself has to report (gaps, presence) travels as readings of the node `gateway`, so that it is kept,
ordered and confirmed in the same way.
"""

from __future__ import annotations

import enum

import msgspec

GATEWAY = "gateway"
"""The reserved node name under which the gateway numbers its own records."""

Value = int | str | None
"""A channel's value: a scaled integer, the reason of a failed read, or None (not due in this sample)."""


class Channel(msgspec.Struct, frozen=True, array_like=True):
    """One column of a node's readings; `value / scale` is in `unit` (SenML unit, RFC 8428 section 12.1)."""

    name: str
    unit: str
    scale: int
    sensor: str
    kind: str


class Manifest(msgspec.Struct, frozen=True):
    """What the columns of a node's readings mean. `hash` is the first 8 hex of sha256 over the payload."""

    hash: str
    channels: tuple[Channel, ...]
    period_ms: int


class Event(msgspec.Struct, frozen=True, array_like=True):
    """What the gateway reports about a node: `kind` is `gap`, `thinned` or `presence`.

    A gap: rows `first` to `last` of `(node, install, boot)` will never come, `why` says who gave them up; `last`
    None means "from `first` on, number unknown". Thinned: these rows were replaced by one record, whose values are
    four for each channel of its manifest: minimum, maximum, mean (scaled as the channel is) and count. Presence:
    `why` is the new state (`up`, `lost`, `bye`, ...).
    """

    kind: str
    node: str
    install: str
    boot: int
    first: int
    last: int | None
    why: str


class Quality(enum.IntEnum):
    """What a reading's date rests on."""

    SYNCED = 0
    """The gateway heard this boot of the node, and its own clock was set."""
    ANCHORED = 1
    """The node itself had heard the time, and counted on from there."""
    BOUNDED = 2
    """The boot never heard the time: an interval between the boots round it."""
    UNSYNCED = 3
    """The gateway's own clock was not set: the date may be years off, distances within a boot are right."""
    CORRECTED = 4
    """The gateway's clock was not set when the reading came; it was corrected when the clock was."""


class Reading(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One row, measured within `time_ms ± error_ms` (unix milliseconds).

    An `error_ms` of -1 means: not later than `time_ms`, how much earlier is not known. `uptime_ms` is the node's own
    clock, in the boot `boot`, when it measured. The gateway's own records have an `event` and no values, save a
    thinned one. `era` is the stretch of the gateway's clock by which the row was dated (`clock.Eras`).

    Not tracked by the collector of cycles: it holds plain values only, and tens of thousands wait in the stage.
    """

    node: str
    install: str
    boot: int
    seq: int
    uptime_ms: int
    time_ms: int
    error_ms: int
    manifest: str
    values: tuple[Value, ...]
    event: Event | None = None
    quality: int = Quality.SYNCED
    era: int = 0

    @property
    def id(self) -> str:
        """The identity as one word, the same in every repeat: `greenhouse-1.a1b2c3d4e5f6.3.17`."""
        return f"{self.node}.{self.install}.{self.boot}.{self.seq}"
