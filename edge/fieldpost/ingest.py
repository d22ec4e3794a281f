"""Message -> reading -> spool -> ack: what the gateway does with what its nodes send.

A node frees its readings on `ack` only, so the rule here is short: nothing is acknowledged before the spool says
that it is durable, and nothing beyond a hole that may still be filled. PUBACK follows `ack`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass
from typing import TypeVar

from . import wire
from .errors import Malformed
from .mqtt import Connection, Incoming
from .nodes.presence import Presence
from .nodes.time import Dating
from .reading import Event, Manifest, Quality, Reading
from .spool import Spool, Ticket
from .spool.marks import Key
from .urgency import Urgency

log = logging.getLogger(__name__)

T = TypeVar("T")

HURRY_MESSAGES = 4
"""So many unacknowledged messages of one node are half of its window: it will soon have to wait for us."""

MAX_NODES = 10_000
"""Nodes that are remembered. The broker knows whom it lets in; this and the next two bound memory."""

MAX_MANIFESTS = 64
"""Manifests of one node since the gateway started."""

KEPT_INSTALLS = 4
"""Installs of one node that are remembered."""


@dataclass(slots=True)
class _Pending:
    """A message whose rows are in `ticket`; when that is safe, `(boot, upto)` is acknowledged.

    `again`: it came too early, and the node must hear how far we are, also where that is -1, nothing of this boot.
    """

    ticket: Ticket
    node: str
    install: str
    boot: int
    upto: int
    again: bool
    mid: int
    connection: Connection


class Ingest:
    """Takes messages, and acknowledges them when they are safe."""

    def __init__(self, spool: Spool, presence: Presence, dating: Dating, urgency: Urgency | None = None) -> None:
        self._spool = spool
        self._urgency = urgency or Urgency(())
        self._presence = presence
        self._dating = dating
        self._pending: deque[_Pending] = deque()
        self._waiting: dict[str, int] = {}
        self._acknowledged: dict[str, dict[str, tuple[int, int]]] = {}
        self._current: dict[str, dict[str, int]] = {}
        self._manifests: dict[str, set[str]] = {}
        self._news = asyncio.Event()
        self.rejected: dict[str, int] = {}
        self.synchronised: bool | None = None  # what the kernel said last; None: ask it
        self.refused = 0
        self.ahead = 0
        self.messages = 0
        self.rows = 0

    def take(self, connection: Connection, message: Incoming) -> None:
        """One message of the intake connection: rows, or what their columns mean."""
        self.messages += 1
        try:
            node, leaf = wire.parse_topic(message.topic)
            if node not in self._presence.nodes and len(self._presence.nodes) >= MAX_NODES:
                raise Malformed("nodes", f"{node} would be one more than {MAX_NODES}")
            if leaf == "manifest":
                self._take_manifest(node, wire.parse_manifest(message.payload))
            elif leaf == "data":
                if message.retained:
                    raise Malformed("retained", "rows are never retained")
                self._take_rows(connection, node, wire.parse_data(message.payload), message)
                return
            else:
                raise Malformed("topic", leaf[:40])
        except Malformed as malformed:
            self.reject(message, malformed)
        connection.acknowledge(message.mid)

    def _take_manifest(self, node: str, manifest: Manifest) -> None:
        hashes = self._manifests.setdefault(node, set())
        if manifest.hash not in hashes and len(hashes) >= MAX_MANIFESTS:
            raise Malformed("manifests", f"{node} has published {MAX_MANIFESTS} different ones")
        hashes.add(manifest.hash)
        self._spool.keep_manifest(manifest)

    def reject(self, message: Incoming, malformed: Malformed) -> None:
        """Count what is not the protocol, and log the first of each reason from each topic."""
        key = malformed.reason
        if self.rejected.get(key, 0) < 1:
            log.warning("rejected a message to %r: %s (further ones are counted)", message.topic[:80], malformed)
        self.rejected[key] = self.rejected.get(key, 0) + 1

    def _take_rows(self, connection: Connection, node: str, data: wire.Data, message: Incoming) -> None:
        if data.rows and self._spool.manifest(data.manifest) is None:
            raise Malformed("manifest", f"{node} names {data.manifest}, which it has not published")
        if len(data.rows) + len(data.drops) > self._spool.room:
            # The node keeps them and sends them again; an unacknowledged message would only fill the broker's window.
            self.refused += 1
            connection.acknowledge(message.mid)
            return
        key = (node, data.install, data.boot)
        self._hear(node, data, message)
        self._begin(key, data)
        if data.rows and data.first_seq > self._spool.upto(key) + 1:
            # A message before this one is missing. Taken now, these rows would overtake it upstream; the ack that
            # says again how far we are makes the node start there.
            self.ahead += 1
            ticket, again = self._spool.ticket, True
            self._spool.hurry()
        else:
            again = False
            readings = self._readings(node, data)
            self.rows += len(readings)
            ticket = self._spool.append(readings, self._urgent(node, data))
        upto = self._spool.upto(key)
        self._pending.append(_Pending(ticket, node, data.install, data.boot, upto, again, message.mid, connection))
        waiting = self._waiting[node] = self._waiting.get(node, 0) + 1
        if waiting >= HURRY_MESSAGES:
            self._spool.hurry()
        self._news.set()

    def _begin(self, key: Key, data: wire.Data) -> None:
        """What a node declares: rows that it gave up, rows that were acknowledged earlier, the end of a boot."""
        node, install, boot = key
        current = self._current.setdefault(node, {})
        if data.current and current.get(install, -1) < boot:
            self._end_older(key)
            _keep(current, install, boot)
        for first, last in data.drops:
            for a, b in self._spool.mark(key, first, last):
                self._spool.report(Event("gap", node, install, boot, a, b, "dropped by the node"))
                self._presence.node(node).missing += b - a + 1
        if data.held > 0:
            self._spool.mark(key, 0, data.held - 1)

    def _end_older(self, key: Key) -> None:
        """A node sends rows of its current boot only when the older ones are done: what is missing died in RAM."""
        node, install, boot = key
        older = [k for k in self._spool.boots(node) if k[1] == install and k[2] < boot]
        if not older or self._spool.upto(key) >= 0:
            return
        first = self._spool.upto(older[-1]) + 1
        known = self._presence.node(node)
        told = known.ended.get((install, older[-1][2]))
        if told is not None and told == first - 1:
            return  # it said goodbye, and everything up to there has come
        last = told if told is not None and told >= first else None
        why = "lost with the node's memory" if last is not None else "perhaps lost with the node's memory"
        self._spool.report(Event("gap", node, install, older[-1][2], first, last, why))

    def _hear(self, node: str, data: wire.Data, message: Incoming) -> None:
        now = boottime_ms()
        known = self._presence.node(node)
        known.last_seen_ms = now
        known.readings += len(data.rows)
        if data.current and not message.repeated:
            self._dating.hear(node, data.install, data.boot, data.uptime_ms, now)

    def _urgent(self, node: str, data: wire.Data) -> Collection[int]:
        """The seqs of the rows that overtake the others: decided here, once."""
        manifest = self._spool.manifest(data.manifest)
        if manifest is None or not self._urgency.concerns(node):
            return ()
        return {data.first_seq + n for n, row in enumerate(data.rows) if self._urgency.is_urgent(node, manifest, row)}

    def _readings(self, node: str, data: wire.Data) -> list[Reading]:
        install, boot, first, manifest = data.install, data.boot, data.first_seq, data.manifest
        uptimes = [data.uptime_ms - age for age in data.ages_ms]
        self._spool.observe_clock(self.synchronised)
        era = self._spool.era
        dated, quality = self._dating.date(
            node, install, boot, uptimes, data.anchor, boottime_ms(), time.time_ns() // 1_000_000
        )
        if quality is Quality.SYNCED and not self._spool.is_clock_set:
            quality = Quality.UNSYNCED
        return [
            Reading(node, install, boot, first + n, uptime, at, error, manifest, row, None, quality, era)
            for n, (row, uptime, (at, error)) in enumerate(zip(data.rows, uptimes, dated, strict=True))
        ]

    async def acknowledge(self, connection: Connection) -> None:
        """Publish `ack`, then PUBACK, for whatever has become safe; until cancelled. Raises Unreachable."""
        while True:
            while not self._pending:
                self._news.clear()
                await self._news.wait()
            await self._spool.until_safe(self._pending[0].ticket)
            acks: dict[tuple[str, str], tuple[int, int]] = {}
            done: list[_Pending] = []
            while self._pending and self._spool.is_safe(self._pending[0].ticket):
                pending = self._pending.popleft()
                done.append(pending)
                self._waiting[pending.node] -= 1
                if pending.upto >= 0 or pending.again:
                    to = (pending.boot, pending.upto)
                    acks[(pending.node, pending.install)] = max(acks.get((pending.node, pending.install), to), to)
            for (node, install), (boot, seq) in acks.items():
                installs = self._acknowledged.setdefault(node, {})
                _keep(installs, install, max(installs.get(install, (boot, seq)), (boot, seq)))
                ack = wire.encode_ack(install, *installs[install])
                connection.publish(wire.ack_topic(node), ack, qos=0, retain=True)
            for pending in done:
                pending.connection.acknowledge(pending.mid)
            await asyncio.sleep(0)

    def forget_pending(self) -> None:
        """The connections are gone: what came on them is acknowledged when the nodes send it again."""
        self._pending.clear()
        self._waiting.clear()

    def acknowledge_again(self, control: Connection, node: str, install: str) -> None:
        """The retained `ack` of a node, as the card has it: the broker may have lost it."""
        acked = self._acknowledged.get(node, {}).get(install)
        if acked is not None:
            control.publish(wire.ack_topic(node), wire.encode_ack(install, *acked), qos=0, retain=True)

    def remember(self) -> None:
        """What the spool had on the card when it was opened is acknowledged: call before anything is taken."""
        for (node, install, boot), upto in self._spool.known():
            if upto >= 0:
                installs = self._acknowledged.setdefault(node, {})
                _keep(installs, install, max(installs.get(install, (boot, upto)), (boot, upto)))


def _keep(installs: dict[str, T], install: str, value: T) -> None:
    """Put down something of an install, and forget the oldest of too many."""
    installs[install] = value
    while len(installs) > KEPT_INSTALLS:
        del installs[next(iter(installs))]


def boottime_ms() -> int:
    """CLOCK_BOOTTIME: no clock setting moves it, and it goes on while the machine sleeps."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000
