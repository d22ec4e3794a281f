"""Identity marks: which rows of a boot have been taken, so that a repeat is a no-op.

A pure state machine. For each `(node, install, boot)` it keeps a contiguous high-water `upto` (everything up to
it has come, was declared dropped, or was acknowledged before) and the few ranges beyond it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Key = tuple[str, str, int]
"""A boot of a node: (node, install, boot)."""

MAX_RANGES = 64
"""Ranges beyond the high-water that one boot may have: a node is at most 8 messages ahead."""

KEPT_BOOTS = 8
"""Boots that are remembered for a node; a node sends no older boot once a newer one is acknowledged."""


@dataclass(slots=True)
class BootMarks:
    """The rows of one boot that are taken: 0..upto, and `beyond` (sorted, disjoint, not touching)."""

    upto: int = -1
    beyond: list[tuple[int, int]] = field(default_factory=list)

    def has(self, seq: int) -> bool:
        return seq <= self.upto or any(first <= seq <= last for first, last in self.beyond)

    def take(self, first: int, last: int) -> list[tuple[int, int]]:
        """Mark `first..last` as taken; returns the parts that were not taken before, in order.

        Returns nothing, and takes nothing, where the boot would come to have more than MAX_RANGES ranges.
        """
        fresh = self._missing(first, last)
        if not fresh:
            return []
        merged: list[tuple[int, int]] = []
        for start, end in sorted([*self.beyond, *fresh]):
            if merged and start <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        upto = self.upto
        if merged[0][0] <= upto + 1:
            upto = merged.pop(0)[1]
        if len(merged) > MAX_RANGES:
            return []
        self.upto, self.beyond = upto, merged
        return fresh

    def _missing(self, first: int, last: int) -> list[tuple[int, int]]:
        missing = []
        start = max(first, self.upto + 1)
        for taken_first, taken_last in self.beyond:
            if taken_last < start:
                continue
            if taken_first > last:
                break
            if start < taken_first:
                missing.append((start, taken_first - 1))
            start = taken_last + 1
        if start <= last:
            missing.append((start, last))
        return missing


class Marks:
    """The marks of all boots, and which of them changed since they were last saved."""

    def __init__(self) -> None:
        self._boots: dict[Key, BootMarks] = {}
        self._by_node: dict[str, list[Key]] = {}
        self._changed: set[Key] = set()
        self._forgotten: set[Key] = set()

    def load(self, key: Key, upto: int, beyond: list[tuple[int, int]]) -> None:
        """Put back what was saved; the oldest boots of a node are loaded first."""
        self._boots[key] = BootMarks(upto, beyond)
        self._by_node.setdefault(key[0], []).append(key)

    def boot(self, key: Key) -> BootMarks:
        """The marks of one boot; a boot not seen before begins empty, and the node's oldest is forgotten."""
        marks = self._boots.get(key)
        if marks is None:
            marks = self._boots[key] = BootMarks()
            keys = self._by_node.setdefault(key[0], [])
            keys.append(key)
            if len(keys) > KEPT_BOOTS:
                oldest = keys.pop(0)
                del self._boots[oldest]
                self._changed.discard(oldest)
                self._forgotten.add(oldest)
            self._forgotten.discard(key)
        return marks

    def take(self, key: Key, first: int, last: int) -> list[tuple[int, int]]:
        """Mark rows as taken; returns the parts that are new."""
        fresh = self.boot(key).take(first, last)
        if fresh:
            self._changed.add(key)
        return fresh

    def upto(self, key: Key) -> int:
        """Everything of this boot up to here is accounted for; -1 where nothing is."""
        marks = self._boots.get(key)
        return marks.upto if marks else -1

    def known(self) -> list[tuple[Key, int]]:
        """Every boot, with its `upto`."""
        return [(key, marks.upto) for key, marks in self._boots.items()]

    def boots(self, node: str) -> list[Key]:
        """The boots known of a node, in the order in which they were first seen."""
        return list(self._by_node.get(node, ()))

    def write_all(self) -> None:
        """Everything must be saved again."""
        self._changed = set(self._boots)

    def changes(self) -> tuple[list[tuple[Key, int, list[tuple[int, int]]]], list[Key]]:
        """What must be saved and what must be deleted since the last call."""
        saved = [(key, self._boots[key].upto, list(self._boots[key].beyond)) for key in self._changed]
        gone = list(self._forgotten)
        self._changed, self._forgotten = set(), set()
        return saved, gone

    def put_back(self, changes: tuple[list[tuple[Key, int, list[tuple[int, int]]]], list[Key]]) -> None:
        """What `changes` handed out was not saved after all: hand it out again."""
        self._changed |= {key for key, _, _ in changes[0] if key in self._boots}
        self._forgotten |= {key for key in changes[1] if key not in self._boots}
