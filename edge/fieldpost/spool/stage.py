"""The stage: the newest readings of each lane in memory, from the oldest that some route may still want to the head.

A pure state machine over positions. Readings below `committed` are on the card too and may be let go of; those
from `committed` on exist nowhere else at the gateway, so their number is what the stage's limit counts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import IntEnum
from itertools import islice

from ..reading import Reading

TAKEN_EVERY_MS = 100
"""How exactly it is remembered when a position was taken."""


class LaneName(IntEnum):
    """`URGENT` readings overtake all others; decided once, at intake. Each lane has positions of its own."""

    URGENT = 0
    BULK = 1


class Lane:
    """Readings of one lane by position, `first <= committed <= head`.

    `write_to`: an uplink that forgets has confirmed up to here, so up to here only the card is safe.
    """

    def __init__(self, name: LaneName, head: int, recent: int) -> None:
        self.name = name
        self._readings: deque[Reading] = deque()
        self._taken: deque[tuple[int, int]] = deque()
        self._recent = recent
        self.first = self.committed = self.head = self.write_to = head

    @property
    def waiting(self) -> int:
        """How many readings are not on the card."""
        return self.head - self.committed

    def put(self, reading: Reading, now_ms: int) -> None:
        """Take a reading at `now_ms` of the spool's clock."""
        self.put_all((reading,), now_ms)

    def put_all(self, readings: Sequence[Reading], now_ms: int) -> None:
        """Take readings at `now_ms` of the spool's clock."""
        if not self._taken or now_ms - self._taken[-1][1] >= TAKEN_EVERY_MS:
            self._taken.append((self.head, now_ms))
        self._readings.extend(readings)
        self.head += len(readings)

    def taken_ms(self, position: int) -> int:
        """When a position was taken, to a tenth of a second; it must not be on the card yet."""
        at = self._taken[0][1] if self._taken else 0
        for since, taken_ms in self._taken:
            if since > position:
                break
            at = taken_ms
        return at

    def read(self, position: int, limit: int) -> list[Reading]:
        """Readings from `position` on, which must lie within `first..head`."""
        start = position - self.first
        return list(islice(self._readings, start, start + limit))

    def commit(self, past: int) -> None:
        """Everything below `past` is on the card now, or need never be there."""
        self.committed = past
        while len(self._taken) > 1 and self._taken[1][0] <= past:
            self._taken.popleft()
        if past == self.head:
            self._taken.clear()

    def forget(self, wanted_from: int) -> None:
        """Let go of what is on the card and no route wants, and of the oldest on the card beyond `recent`."""
        keep_from = min(self.committed, max(wanted_from, self.committed - self._recent))
        while self.first < keep_from:
            self._readings.popleft()
            self.first += 1
