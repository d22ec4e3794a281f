"""Which nodes are there: what their states and last wills say, and what their messages show.

A pure state machine. Only changes are reported, as presence records; a will that is older than the newest `up` is
stale and ignored; two boards that use one id are noticed by their states and named.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..reading import Event
from ..wire import State

CONFLICT_SHOWN_MS = 600_000
"""How long a conflict is shown after it was last seen."""


@dataclass(slots=True)
class Node:
    """What is known of one node; times are the gateway's CLOCK_BOOTTIME in ms, -1: never."""

    st: str = "unknown"
    install: str = ""
    boot: int = 0
    connection: int = 0
    firmware: str = ""
    queued: int = 0
    uptime_ms: int = 0
    last_seq: int | None = None
    last_seen_ms: int = -1
    readings: int = 0
    missing: int = 0
    ended: dict[tuple[str, int], int | None] = field(default_factory=dict)
    installs: dict[str, int] = field(default_factory=dict)
    conflict: str = ""
    conflict_ms: int = -1

    @property
    def newest(self) -> tuple[int, int]:
        return self.boot, self.connection


class Presence:
    """All nodes that were heard of since the gateway started."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self.stale_wills = 0

    def node(self, name: str) -> Node:
        return self.nodes.setdefault(name, Node())

    def take(self, name: str, state: State, now_ms: int, *, live: bool) -> Event | None:
        """A state came in (not `live`: one that the broker had retained); returns what upstream should know of it."""
        node = self.node(name)
        if state.st == "lost":
            if (state.install, state.boot, state.connection) != (node.install, *node.newest) and node.install:
                self.stale_wills += 1
                return None
        else:
            if live:
                self._notice_conflict(name, node, state, now_ms)
                node.last_seen_ms = now_ms
            node.firmware, node.queued, node.last_seq = state.firmware, state.queued, state.last_seq
        self._remember_end(node, state)
        before = (node.st, node.install, *node.newest)
        node.st, node.install = state.st, state.install
        node.boot, node.connection = state.boot, state.connection
        if before == (node.st, node.install, *node.newest):
            return None
        return Event("presence", name, state.install, state.boot, state.connection, None, state.st)

    def _remember_end(self, node: Node, state: State) -> None:
        """The last seq that a boot told; the gap at a boot's end is known by it."""
        if state.last_seq is not None:
            node.ended[(state.install, state.boot)] = state.last_seq
            while len(node.ended) > 4:
                del node.ended[next(iter(node.ended))]

    def conflict(self, name: str, now_ms: int) -> str:
        """Why a node is thought to be two, or nothing."""
        node = self.node(name)
        recent = node.conflict_ms >= 0 and now_ms - node.conflict_ms < CONFLICT_SHOWN_MS
        return node.conflict if recent else ""

    def _notice_conflict(self, name: str, node: Node, state: State, now_ms: int) -> None:
        """A board never comes back to an install, or to a connection, that it has left."""
        if state.st != "up":
            return
        newest = node.installs.get(state.install)
        this = state.boot << 32 | state.connection
        if newest is not None and state.install != node.install:
            others = sorted(install for install in node.installs if install != state.install)
            node.conflict = f"two boards use the id {name}: installs {state.install} and {', '.join(others)}"
            node.conflict_ms = now_ms
        elif newest is not None and (this < newest or (this == newest and (state.uptime_ms or 0) < node.uptime_ms)):
            node.conflict = f"two boards use the id {name}: both say that they are install {state.install}"
            node.conflict_ms = now_ms
        node.installs[state.install] = max(this, newest or 0)
        node.uptime_ms = state.uptime_ms or 0
        while len(node.installs) > 4:
            del node.installs[next(iter(node.installs))]
