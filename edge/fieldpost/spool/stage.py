"""The stage: the newest readings in memory, from the oldest that some route may still want to the head.

A pure state machine over positions. Readings below `committed` are on the card too and may be let go of; those
from `committed` on exist nowhere else at the gateway, so their number is what the stage's limit counts.
"""

from __future__ import annotations

from collections import deque
from itertools import islice

from ..reading import Reading


class Stage:
    """Readings by position, `first <= committed <= head`."""

    def __init__(self, head: int, recent: int) -> None:
        self._readings: deque[Reading] = deque()
        self._recent = recent
        self.first = self.committed = self.head = head

    @property
    def waiting(self) -> int:
        """How many readings are not on the card."""
        return self.head - self.committed

    def put(self, reading: Reading) -> None:
        self._readings.append(reading)
        self.head += 1

    def uncommitted(self, limit: int) -> list[Reading]:
        """The oldest readings that are not on the card, `limit` at most."""
        return self.read(self.committed, limit)

    def read(self, position: int, limit: int) -> list[Reading]:
        """Readings from `position` on, which must lie within `first..head`."""
        start = position - self.first
        return list(islice(self._readings, start, start + limit))

    def commit(self, past: int) -> None:
        """Everything below `past` is on the card now."""
        self.committed = past

    def forget(self, wanted_from: int) -> None:
        """Let go of what is on the card and no route wants, and of the oldest on the card beyond `recent`."""
        keep_from = min(self.committed, max(wanted_from, self.committed - self._recent))
        while self.first < keep_from:
            self._readings.popleft()
            self.first += 1
