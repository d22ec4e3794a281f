"""What somebody upstream sees: readings by node, gaps, repeats and order, counted as they arrive."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from .errors import Malformed
from .forms import Arrived, decode
from .spool.marks import BootMarks

HISTORY = 30
KEPT_BOOTS = 16
MAX_CHANNELS = 256
MAX_NODES = 10_000


@dataclass(slots=True)
class Channel:
    """A channel's newest value, and its last numbers for a picture."""

    value: float | str = ""
    unit: str = ""
    history: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))


@dataclass(slots=True)
class NodeTally:
    """What has arrived of one node. `missing` counts the readings that its gap records name."""

    readings: int = 0
    repeats: int = 0
    disordered: int = 0
    gaps: int = 0
    missing: int = 0
    newest_gap: str = ""
    state: str = ""
    time_s: float = 0.0
    error_s: float = 0.0
    newest: tuple[str, int, int] = ("", -1, -1)
    newest_of: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    channels: dict[str, Channel] = field(default_factory=dict)
    boots: dict[tuple[str, int], BootMarks] = field(default_factory=dict)


class Tally:
    """All that has arrived."""

    def __init__(self) -> None:
        self.nodes: dict[str, NodeTally] = {}
        self.readings = 0
        self.repeats = 0
        self.malformed = 0
        self.bytes = 0
        self._records = NodeTally()

    def take(self, body: bytes) -> list[tuple[Arrived, bool]]:
        """Count a message; returns its rows, each with whether it is a repeat. One that is no pack is counted."""
        self.bytes += len(body)
        try:
            rows = list(decode(body))
        except Malformed:
            self.malformed += 1
            return []
        return [(row, self._count(row)) for row in rows]

    def _count(self, row: Arrived) -> bool:
        if row.event is not None:
            return self._count_event(row)
        node = self._node(row.node)
        if _seen(node, row):
            node.repeats += 1
            self.repeats += 1
            return True
        node.readings += 1
        self.readings += 1
        this = (row.install, row.boot, row.seq)
        before = node.newest_of.get(row.lane, ("", -1, -1))
        if before[0] == row.install and this[1:] < before[1:]:
            node.disordered += 1  # an order holds within a lane: history follows what is fresh
        else:
            node.newest_of[row.lane] = this
        if node.newest[0] == row.install and this[1:] < node.newest[1:]:
            return False  # counted; what is shown as newest stays
        node.newest = this
        node.time_s, node.error_s = row.time_s, row.error_s
        for name, (value, unit) in row.values.items():
            if name not in node.channels and len(node.channels) >= MAX_CHANNELS:
                continue
            channel = node.channels.setdefault(name, Channel())
            channel.value = value
            if isinstance(value, float):
                channel.unit = unit
                channel.history.append(value)
        return False

    def _count_event(self, row: Arrived) -> bool:
        """A record of the gateway's own, about a node."""
        event = row.event
        assert event is not None
        if _seen(self._records, row):
            self.repeats += 1
            return True
        node = self._node(event.node)
        if event.kind == "presence":
            node.state = event.why
        elif event.kind in ("gap", "thinned"):
            node.gaps += 1
            if event.last is not None:
                node.missing += max(0, event.last - event.first + 1)
                _marks(node, event.install, event.boot).take(event.first, event.last)
            until = "?" if event.last is None else event.last
            node.newest_gap = f"{event.first}-{until} of boot {event.boot}: {event.why}"
        return False

    def _node(self, name: str) -> NodeTally:
        if name not in self.nodes and len(self.nodes) >= MAX_NODES:
            return NodeTally()
        return self.nodes.setdefault(name, NodeTally())


def _seen(node: NodeTally, row: Arrived) -> bool:
    """Whether this row came before; from now on it has."""
    marks = _marks(node, row.install, row.boot)
    if marks.has(row.seq):
        return True
    marks.take(row.seq, row.seq)
    return False


def _marks(node: NodeTally, install: str, boot: int) -> BootMarks:
    marks = node.boots.setdefault((install, boot), BootMarks())
    while len(node.boots) > KEPT_BOOTS:
        del node.boots[next(iter(node.boots))]
    return marks


BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[float]) -> str:
    """The course of some numbers as one line, from their smallest to their largest."""
    if not values:
        return ""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(BARS[min(len(BARS) - 1, int((value - low) / span * len(BARS)))] for value in values)
