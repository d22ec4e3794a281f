"""The spool, driven by hand into every corner that Hypothesis finds, against the plain sets of reference.py.

The real spool on real SQLite: only its thread and its clock are the test's own, so that what happens between two
steps of the spool is drawn too. Nodes behave as ours do, the glue of `Gateway` is what ingest and forward do.

python -m tests.edge.test_spool_model [--examples 5000] [--steps 60] [--seed N]    writes MODEL.md beside this file

runs others each time; a failing one is made short, and comes again by its seed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import platform
import random
import secrets
import shutil
import sqlite3
import sys
import tempfile
import time
import types
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fieldpost.spool
import pytest
from fieldpost.errors import SpoolFault
from fieldpost.forward import _halves
from fieldpost.reading import GATEWAY, Event, Reading
from fieldpost.spool import Batch, Kind, LaneName, Limits, RouteTerms, Ticket
from fieldpost.spool.card import Card
from fieldpost.spool.rows import Commit, decode_row, place_position
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

sys.path[:0] = [
    str(Path(__file__).parent.parent),
    str(Path(__file__).parent),
    str(Path(__file__).parent.parent.parent / "edge"),
]

from reference import NOBODY, Reference, concerns, content, ids_in, ids_of_event  # noqa: E402
from spools import INSTALL, MANIFEST, HandClock, reading, spool_in  # noqa: E402

NODES = ("n1", "n2", "n3")
URGENT_EVERY = 5
ROUTES = {
    "a": RouteTerms("a", batch_readings=3),
    "b": RouteTerms("b", batch_readings=5, ttl_ms=200_000),
    "c": RouteTerms("c", batch_readings=4),
}
KINDS: tuple[Kind, ...] = ("urgent", "live", "backfill")
KEEPS_MS = (0, 60_000, 7 * 86_400_000, 7 * 86_400_000)
NEVER_FULL = 10**9
WINDOW = 4


some_routes = st.sampled_from(["abc", "a", "b", "ab", "bc", "ac", "abc", ""])
which = st.integers(0, 11)
"""Which of the routes that there are."""

mostly = st.sampled_from([True, True, True, False])
routed = precondition(lambda self: bool(self.routes))
ALL = 10_000
"""More turns than anything takes."""

SEEN: Counter[str] = Counter()
"""What has happened in all examples: a model that never gets into a corner proves nothing of it."""


DRAW = ("folder", "log", "rows")
"""The modules that draw ids."""


class HandSecrets:
    """Ids that are the same in every run of an example: by their bytes pages fill, and by those the limits decide."""

    def __init__(self) -> None:
        self._chance = random.Random(0)

    def token_hex(self, count: int) -> str:
        return self._chance.randbytes(count).hex()


@types.coroutine
def turn() -> Generator[None, None, None]:
    """Lets others have their turn; needs no event loop."""
    yield


class HandCard(Card):
    """The card without its thread: a call is made at once, and its caller goes on when the test lets it."""

    def __init__(self, folder: Path, written: Callable[[Commit], None]) -> None:
        super().__init__(folder)
        self._written = written
        self.is_full = False
        self.failing: Commit | None = None

    async def run(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            result = call(*args, **kwargs)
        except SpoolFault:
            await turn()
            raise
        await turn()
        return result

    def write(self, commit: Commit) -> None:
        db = self.log._opened()
        pages = db.execute("PRAGMA page_count").fetchone()[0] if self.is_full else 1 << 30
        db.execute(f"PRAGMA max_page_count={pages}")
        self.failing = commit
        super().write(commit)
        self.failing = None
        self._written(commit)


def finish(work: Coroutine[Any, Any, Any]) -> Any:
    """Let a coroutine run to its end."""
    try:
        while True:
            work.send(None)
    except StopIteration as end:
        return end.value


@dataclass
class Boot:
    """One boot of a node: rows below `made` exist, up to `acked` they are the gateway's, `sent` says where it is."""

    number: int
    made: int = 0
    sent: int = 0
    acked: int = -1
    dropped: set[int] = field(default_factory=set)


@dataclass
class Far:
    """A far side, its link, and what is on its way to it."""

    up: bool = False
    durable: bool = False
    windows: dict[Kind, deque[Batch]] = field(default_factory=lambda: {kind: deque() for kind in KINDS})
    seen: set[str] = field(default_factory=set)
    newest: dict[tuple[Kind, str], tuple[int, int]] = field(default_factory=dict)

    def let_go(self) -> None:
        for window in self.windows.values():
            window.clear()


class Gateway(RuleBasedStateMachine):
    """A gateway, its nodes and its far sides."""

    # Opening.

    @initialize(
        stage=st.sampled_from([10, 40]),
        keep=st.sampled_from(KEEPS_MS),
        write=st.sampled_from(["when-needed", "always"]),
        ack_when=st.sampled_from(["durable", "durable", "durable", "any-uplink", "all-uplinks"]),
        full=st.sampled_from(["thin", "drop-oldest", "hold"]),
        age=st.sampled_from([0, 300_000]),
        lane=st.sampled_from([0, 2000]),
        routes=some_routes,
    )
    def begins(
        self, stage: int, keep: int, write: str, ack_when: str, full: str, age: int, lane: int, routes: str
    ) -> None:
        self.folder = Path(
            tempfile.mkdtemp(prefix="fieldpost-model-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        )
        self.runner = asyncio.Runner()
        chance = HandSecrets()
        for module in DRAW:
            sys.modules[f"fieldpost.spool.{module}"].secrets = chance  # type: ignore[attr-defined]
        self.clock = HandClock()
        self.limits = {LaneName.BULK: Limits(lane, age), LaneName.URGENT: Limits(lane, 2 * age)}
        self.terms = {
            "stage_readings": stage,
            "keep_ms": keep,
            "write": write,
            "ack_when": ack_when,
            "full": full,
            "limits": self.limits,
            "linger_ms": 1000,
            "event_linger_ms": 500,
            "lazy_ms": 60_000,
        }
        self.reference = Reference()
        self.far = {route: Far() for route in ROUTES}
        self.nodes = {name: [Boot(1)] for name in NODES}
        self.known: dict[str, dict[int, set[int]]] = {}
        self.saved_known: dict[str, dict[int, set[int]]] = {}
        self.age = self.saved_age = 0
        self.saved_machine = self.clock.machine
        self.inherited: set[str] = set()
        self.paused: dict[str, Coroutine[Any, Any, Any]] = {}
        self.places: dict[tuple[str, LaneName, int], str] = {}
        self.told: set[Event] = set()
        self.is_disk_full = False
        self.opens(routes)
        self.a_while_goes_by(counts=[7, 4])

    def opens(self, routes: Iterable[str]) -> None:
        if self.saved_machine != self.clock.machine:  # nothing tells how long the machine was off
            self.age = self.saved_age
        self.routes = sorted(routes)
        self.spool = spool_in(self.folder, clock=self.clock, max_bytes=NEVER_FULL, **self.terms)
        self.spool._routes = tuple(ROUTES[route] for route in self.routes)
        self.card = self.spool._card = HandCard(self.folder, self.written)
        self.card.is_full = self.is_disk_full
        self.pending: deque[tuple[Ticket, str, Boot, int]] = deque()
        self.runner.run(self.open_by_hand())
        self.spool.keep_manifest(MANIFEST)
        self.cached: dict[LaneName, dict[int, Reading]] | None = None
        self.own_records_seen = 0
        self.inherited = self.reference.owed.pop(NOBODY, set()) if self.routes else set()
        for route in self.routes:
            self.reference.owed.setdefault(route, set()).update(self.inherited)

    async def open_by_hand(self) -> None:
        await self.spool.__aenter__()
        self.spool._committer.cancel()  # it has not begun yet: the test says when something is written
        nothing = asyncio.get_running_loop().create_future()
        nothing.set_result(None)
        self.spool._committer = nothing  # type: ignore[assignment]

    def route(self, which: int) -> str:
        """One of those that there are."""
        return self.routes[which % len(self.routes)]

    # What the spool has, read by other means than its own.

    def on_card(self) -> dict[LaneName, dict[int, Reading]]:
        """Every reading in the file, by position."""
        if self.cached is None:
            self.cached = {name: {} for name in LaneName}
            rows = self.card.log._opened().execute(
                "SELECT place, past, count, thinned, at_ms, since_ms, until_ms, crc, ids, body FROM batch"
            )
            for row in rows:
                lane, first = LaneName(row[0] >> 56), place_position(row[0])
                found = decode_row(row)
                assert found is not None
                self.cached[lane] |= {first + at: one for at, one in enumerate(found)}
        return self.cached

    def written(self, commit: Commit) -> None:
        """A commit is on the card. With nothing kept, what everybody has is written and deleted in one."""
        self.cached = None
        stored = [one for lane in self.on_card().values() for one in lane.values()]
        names = [one.id for one in stored]
        assert len(names) == len(set(names)), "a repeat was stored twice"
        self.note_own_records()
        passed = {one.id for _, _, readings in commit.batches for one in readings}
        self.reference.write(set(names) | passed, self.age)
        self.saved_known = {node: {b: set(seqs) for b, seqs in boots.items()} for node, boots in self.known.items()}
        self.inherited = set()
        self.saved_age, self.saved_machine = self.age, self.clock.machine

    def note_own_records(self) -> None:
        """What the gateway itself has begun to report is owed like a reading."""
        lane = self.spool.queue.lanes[LaneName.URGENT]
        for one in lane.read(lane.first, lane.head - lane.first):
            if one.event is not None and one.id not in self.reference.taken:
                self.reference.take(one, self.routes, self.age)

    def readable(self, route: str) -> set[str]:
        """Whom a route will still get, as the spool stands."""
        found: set[str] = set()
        progress = self.spool.queue.progress | self.spool.queue.removed
        for name in LaneName:
            if (route, name) not in progress:
                continue
            stage, card = self.spool.queue.lanes[name], self.on_card()[name]
            for first, past in progress[route, name].pieces(stage.head):
                memory = stage.read(stage.first, stage.head - stage.first)
                here = {at: one for at, one in card.items() if first <= at < min(past, stage.committed)}
                here |= {stage.first + at: one for at, one in enumerate(memory) if first <= stage.first + at < past}
                found |= ids_in(here.values())
        return found

    def ledger(self) -> list[Event]:
        """Every entry, also those that wait to be written."""
        works = [self.spool.queue._work]
        if self.is_writing and self.card.failing is not None:
            works.append(self.card.failing.work)
        rows = self.card.log._opened().execute("SELECT node, install, boot, first, last, why FROM ledger")
        kept = [Event("thinned" if row[5].startswith("thinned") else "gap", *row) for row in rows]
        given_up = [
            Event("gap", node, install, boot, first, last, why)
            for (why, node, install, boot), ranges in self.spool.queue._given_up.items()
            for first, last in ranges
        ]
        return kept + given_up + [event for work in works for _, event in work.ledger]

    def named(self, route: str) -> set[str]:
        """Who was given up for a route, by name."""
        found: set[str] = set()
        for event in self.ledger():
            if concerns(event, route):
                found |= ids_of_event(event)
        return found

    # What comes in.

    def row(self, node: str, boot: int, seq: int) -> Reading:
        return reading(seq, boot=boot, node=node, values=(seq * 7919 + boot, "fault" if seq % 4 == 3 else None))

    def intake(self, node: str, boot: Boot, first: int, count: int, drops: list[tuple[int, int]] = []) -> bool:  # noqa: B006
        """One message, as ingest takes it. False: it was refused, or came too early."""
        spool, key = self.spool, (node, INSTALL, boot.number)
        rows = [self.row(node, boot.number, seq) for seq in range(first, first + count)]
        if len(rows) + len(drops) > spool.room:
            return False
        known = self.known.setdefault(node, {}).setdefault(boot.number, set())
        for a, b in drops:
            for x, y in spool.mark(key, a, b):
                spool.report(Event("gap", node, INSTALL, boot.number, x, y, "dropped by the node"))
                assert not known & set(range(x, y + 1))
                known |= set(range(x, y + 1))
        if boot.acked >= 0:
            spool.mark(key, 0, boot.acked)
            known |= set(range(boot.acked + 1))
        if first > spool.upto(key) + 1:
            self.pending.append((spool.ticket, node, boot, spool.upto(key)))
            return False
        before = spool.ticket
        urgent = {one.seq for one in rows if one.seq % URGENT_EVERY == 0}
        ticket = spool.append(rows, urgent)
        fresh = [one for one in rows if one.seq not in known]
        assert sum(ticket) - sum(before) == len(fresh), "a repeat was taken, or a fresh row was not"
        for one in fresh:
            self.reference.take(one, self.routes, self.age)
            known.add(one.seq)
        for name, at in zip(LaneName, before, strict=True):
            for one in [one for one in fresh if (one.seq in urgent) == (name is LaneName.URGENT)]:
                was = self.places.get((spool.generation, name, at))
                assert was is None or was not in self.reference.acked or was not in self.reference.card, "a place twice"
                self.places[spool.generation, name, at] = one.id
                at += 1
        self.pending.append((ticket, node, boot, spool.upto(key)))
        return True

    def sending(self, node: str) -> Boot:
        """Rows of older boots go first."""
        boots = self.nodes[node]
        return next((boot for boot in boots if boot.acked + 1 < boot.made), boots[-1])

    @precondition(lambda self: not self.is_writing)
    @rule(counts=st.lists(st.integers(0, 9), min_size=1, max_size=4))
    def a_while_goes_by(self, counts: list[int]) -> None:
        """Nodes send, time passes, and what is due is written."""
        for n, count in enumerate(counts):
            self.a_node_sends(node=NODES[n % len(NODES)], count=count)
            self.time_passes(ms=3000)
            self.a_commit_begins(whole=True)

    @rule(node=st.sampled_from(NODES), count=st.integers(1, 9))
    def a_node_sends(self, node: str, count: int) -> None:
        boot = self.sending(node)
        if boot is not self.nodes[node][-1]:
            count = min(count, boot.made - boot.sent)
        if count > 0 and self.intake(node, boot, boot.sent, count):
            boot.sent += count
            boot.made = max(boot.made, boot.sent)

    @rule(node=st.sampled_from(NODES))
    def a_node_goes_back(self, node: str) -> None:
        boot = self.sending(node)
        boot.sent = boot.acked + 1

    @rule(node=st.sampled_from(NODES), ahead=st.integers(1, 3))
    def a_message_overtakes_another(self, node: str, ahead: int) -> None:
        boot = self.nodes[node][-1]
        if boot is self.sending(node):
            upto = self.spool.upto((node, INSTALL, boot.number))
            if not self.intake(node, boot, boot.sent + ahead, 2):
                assert self.spool.upto((node, INSTALL, boot.number)) in (upto, boot.acked)

    @rule(node=st.sampled_from(NODES), count=st.integers(1, 4))
    def a_node_gives_up_its_oldest(self, node: str, count: int) -> None:
        boot = self.sending(node)
        first, last = boot.acked + 1, min(boot.acked + count, boot.made - 1)
        if first <= last:
            self.intake(node, boot, last + 1, 0, [(first, last)])
            boot.sent = max(boot.sent, last + 1)

    @rule(node=st.sampled_from(NODES))
    def a_node_boots(self, node: str) -> None:
        if len(self.nodes[node]) < 4:
            self.nodes[node][-1].made = max(self.nodes[node][-1].made, self.nodes[node][-1].sent)
            self.nodes[node].append(Boot(len(self.nodes[node]) + 1))

    def acknowledge(self) -> None:
        """What is safe is acknowledged, and so it is the gateway's."""
        while self.pending and self.spool.is_safe(self.pending[0][0]):
            _, node, boot, upto = self.pending.popleft()
            named = {route: self.named(route) for route in self.routes or [NOBODY]}
            for seq in range(boot.acked + 1, upto + 1):
                one = f"{node}.{INSTALL}.{boot.number}.{seq}"
                if one in self.reference.taken and one not in self.reference.acked:
                    assert self.reference.may_acknowledge(one, self.terms["write"], self.terms["ack_when"], named), (
                        f"{one} is pretended to be safe"
                    )
                    SEEN["acknowledged" if one in self.reference.card else "acknowledged without the card"] += 1
                    self.reference.acked.add(one)
            boot.acked = max(boot.acked, upto)
            boot.sent = max(boot.sent, boot.acked + 1)
            boot.made = max(boot.made, boot.sent)

    # Writing.

    @property
    def is_writing(self) -> bool:
        return self.spool._committing.locked()

    def step(self, name: str, work: Coroutine[Any, Any, Any], turns: int) -> None:
        """Let something run for some turns; the rest later, when others have had theirs."""
        try:
            for _ in range(turns):
                work.send(None)
        except StopIteration:
            return
        except SpoolFault as fault:
            self.recover(fault)
            return
        self.paused[name] = work

    def recover(self, fault: SpoolFault) -> None:
        SEEN["a write that failed"] += 1
        self.runner.run(self.spool._recover(fault))
        self.cached = None

    def finish(self, name: str) -> None:
        try:
            finish(self.paused.pop(name))
        except SpoolFault as fault:
            self.recover(fault)

    @precondition(lambda self: not self.is_writing)
    @rule(whole=mostly)
    def a_commit_begins(self, whole: bool) -> None:
        self.step("commit", self.spool._commit(), ALL if whole else 1)

    @precondition(lambda self: "commit" in self.paused)
    @rule()
    def a_commit_ends(self) -> None:
        self.finish("commit")

    @rule(is_full=st.booleans())
    def the_disk_is_full_or_not(self, is_full: bool) -> None:
        self.is_disk_full = self.card.is_full = is_full

    @precondition(lambda self: not self.is_writing and "retention" not in self.paused)
    @rule(part=st.sampled_from([0.3, 0.7, 0.9, 2.0]), turns=st.sampled_from([ALL, ALL, 1, 2, 3, 5]))
    def the_limits_are_looked_at(self, part: float, turns: int) -> None:
        retention = self.spool._retention
        retention._max_bytes = round(self.card.bytes * part)
        retention._aged_at = -1000.0
        self.step("retention", retention.keep(lambda: False), turns)

    async def thinning(self) -> None:
        if await self.spool._retention._thin():
            await self.spool._commit()

    @precondition(lambda self: not self.is_writing and "retention" not in self.paused)
    @rule(counts=st.lists(st.integers(2, 9), min_size=1, max_size=3), turns=st.sampled_from([ALL, 1, 2, 3, 4]))
    def rows_are_thinned(self, counts: list[int], turns: int) -> None:
        """The card has filled up, and thinning made just the room that was needed."""
        self.a_while_goes_by(counts=counts)
        self.step("retention", self.thinning(), turns)

    @precondition(lambda self: "retention" in self.paused and "commit" not in self.paused)
    @rule()
    def the_limits_are_kept(self) -> None:
        self.finish("retention")

    # What goes out.

    def link(self, route: str, *, durable: bool) -> None:
        if not self.far[route].up:
            self.far[route].up, self.far[route].durable = True, durable
            self.spool.link(route, up=True, durable=durable)

    def drop_link(self, route: str) -> None:
        if f"take {route}" in self.paused:
            self.paused.pop(f"take {route}").close()  # the task that took is cancelled
        self.far[route].up = self.far[route].durable = False
        self.far[route].let_go()
        self.spool.link(route, up=False)

    @routed
    @rule(at=which, durable=st.booleans())
    def a_link_comes(self, at: int, durable: bool) -> None:
        self.link(self.route(at), durable=durable)

    @routed
    @rule(at=which)
    def a_link_goes(self, at: int) -> None:
        if self.far[self.route(at)].up:
            self.drop_link(self.route(at))

    async def taking(self, route: str, kind: Kind, limit: int) -> None:
        batch = await self.spool.take(route, kind, limit)
        if batch is not None:
            self.far[route].windows[kind].append(batch)
            self.arrives(route, batch)

    def arrives(self, route: str, batch: Batch) -> None:
        """A batch at a far side: is it what was taken, in order, and not for the second time?"""
        SEEN[f"sent as {batch.kind}"] += len(batch.readings)
        self.note_own_records()
        span = batch.flight.span
        if span is not None and not span.whole:
            SEEN["replayed"] += len(batch.readings)
            assert not span.node or {one.event.node if one.event else one.node for one in batch.readings} <= {span.node}
            return
        far, remembered = self.far[route], self.reference.remembered.get(route, set())
        for one in batch.readings:
            if one.event is not None and one.event.kind == "thinned":
                SEEN["sent thinned"] += 1
                continue
            assert content(one) == self.reference.taken[one.id], "another content than was taken"
            assert one.id not in remembered, f"{one.id} was confirmed by {route} and is sent again"
            ttl = ROUTES[route].ttl_ms
            since = self.reference.written_at.get(one.id, self.age)  # its age counts from when it was written
            assert not ttl or self.age - since <= ttl, f"{one.id} is older than {route} may get"
            if one.id in far.seen:
                SEEN["sent again, not having been confirmed"] += 1
            else:
                far.seen.add(one.id)
                newest = far.newest.get((batch.kind, one.node), (0, -1))
                assert (one.boot, one.seq) > newest or one.event is not None, f"{one.id} is overtaken by {newest}"
                far.newest[batch.kind, one.node] = (one.boot, one.seq)

    @routed
    @rule(at=which, kind=st.sampled_from(KINDS), limit=st.sampled_from([1, 3, 50]), whole=mostly)
    def a_route_takes(self, at: int, kind: Kind, limit: int, whole: bool) -> None:
        route = self.route(at)
        far = self.far[route]
        if far.up and f"take {route}" not in self.paused and sum(map(len, far.windows.values())) < WINDOW:
            self.step(f"take {route}", self.taking(route, kind, limit), ALL if whole else 1)

    @routed
    @rule(at=which)
    def a_route_has_taken(self, at: int) -> None:
        if f"take {self.route(at)}" in self.paused:
            self.finish(f"take {self.route(at)}")

    @routed
    @rule(at=which, kind=st.sampled_from(KINDS))
    def a_far_side_confirms(self, at: int, kind: Kind) -> None:
        route = self.route(at)
        if self.far[route].windows[kind]:
            self.confirm(route, self.far[route].windows[kind].popleft())

    @routed
    @rule(at=which, batches=st.integers(1, 6), limit=st.sampled_from([2, 9]))
    def a_route_works(self, at: int, batches: int, limit: int) -> None:
        """Some batches are sent and confirmed: urgent ones first, history last."""
        route = self.route(at)
        if f"take {route}" in self.paused:
            return
        self.link(route, durable=at % 2 == 0)
        for _ in range(batches):
            for kind in KINDS:
                window = self.far[route].windows[kind]
                if not window:
                    finish(self.taking(route, kind, limit))
                if window:
                    self.confirm(route, window.popleft())
                    break

    @routed
    @rule(counts=st.lists(st.integers(1, 9), min_size=1, max_size=3))
    def uplinks_are_faster_than_the_card(self, counts: list[int]) -> None:
        for at in range(len(self.routes)):
            self.link(self.route(at), durable=True)
        for n, count in enumerate(counts):
            self.a_node_sends(node=NODES[n], count=count)
        for at in range(len(self.routes)):
            self.a_route_works(at=at, batches=20, limit=9)

    def confirm(self, route: str, batch: Batch) -> None:
        self.spool.confirm(route, batch)
        self.reference.confirm(route, ids_in(batch.readings), durable=self.far[route].durable)

    @routed
    @rule(at=which, kind=st.sampled_from(KINDS), poison=st.integers(0, 50))
    def a_far_side_refuses(self, at: int, kind: Kind, poison: int) -> None:
        route = self.route(at)
        far = self.far[route]
        if f"take {route}" in self.paused:
            return
        self.link(route, durable=at % 2 == 0)
        if not far.windows[kind]:
            finish(self.taking(route, kind, 7))
        if not far.windows[kind] or not far.windows[kind][0].readings:
            return
        batch, durable = far.windows[kind].popleft(), far.durable
        self.drop_link(route)
        self.link(route, durable=durable)
        self.isolate(route, batch, batch.readings[poison % len(batch.readings)].id)
        self.drop_link(route)

    def isolate(self, route: str, batch: Batch, poison: str) -> None:
        """As forward does: halves, until the bad one stands alone."""
        if poison not in {one.id for one in batch.readings}:
            self.confirm(route, batch)
        elif len(batch.readings) > 1:
            for half in _halves(batch):
                self.isolate(route, half, poison)
        else:
            self.spool.set_aside(route, batch.readings[0], "refused")
            if batch.readings[0].event is not None:  # no gap record tells of a gap record
                self.reference.confirm(route, ids_in(batch.readings), durable=False)
            self.spool.confirm(route, batch)

    @routed
    @precondition(lambda self: not self.is_writing)
    @rule(at=which, since=st.integers(1, 10), node=st.sampled_from(["", *NODES]))
    def somebody_replays(self, at: int, since: int, node: str) -> None:
        with contextlib.suppress(SpoolFault):
            finish(self.spool.replay(self.route(at), self.row("n1", 1, since).time_ms, 0, node))
        self.a_route_works(at=at, batches=since, limit=9)

    @routed
    @precondition(lambda self: not self.is_writing)
    @rule(at=which, counts=st.lists(st.integers(1, 9), min_size=1, max_size=4))
    def an_outage(self, at: int, counts: list[int]) -> None:
        """A line is away for a while, and comes again: what is fresh goes first, and some of what came meanwhile."""
        self.a_link_goes(at=at)
        self.a_while_goes_by(counts=counts)
        self.time_passes(ms=100_000 * (at % 3))
        self.a_route_works(at=at, batches=len(counts), limit=2)

    # Time.

    @rule(ms=st.sampled_from([100, 1000, 70_000, 150_000, 400_000]))
    def time_passes(self, ms: int) -> None:
        self.clock.pass_ms(ms)
        self.age += ms

    @rule(ms=st.sampled_from([-(10**11), -5000, 300, 10**7, 10**12]), synced=st.booleans())
    def the_wall_clock_is_set(self, ms: int, synced: bool) -> None:
        before = self.outline()
        self.clock.unix += ms
        self.clock.synced = synced
        self.spool.observe_clock()
        assert self.outline() == before, "a setting of the clock did more than dates"

    def outline(self) -> object:
        queue = self.spool.queue
        return (
            {key: (p.live, list(p.spans), list(p.flying)) for key, p in queue.everyone()},
            {name: (lane.first, lane.committed, lane.head, queue.safe(name)) for name, lane in queue.lanes.items()},
            self.ledger(),
            queue.age_ms(),
            sorted(self.spool.known()),
        )

    # The end, and after it.

    @rule(routes=some_routes, power=st.booleans(), same=st.booleans())
    def a_crash(self, routes: str, power: bool, same: bool) -> None:
        self.crashes(self.routes if same else routes, power=power)

    def crashes(self, routes: Iterable[str], *, power: bool) -> None:
        self.note_own_records()
        self.forget_links()
        self.card.log.close()
        self.reference.crash()
        self.known = {node: {b: set(seqs) for b, seqs in boots.items()} for node, boots in self.saved_known.items()}
        if power:
            self.clock.machine += "+"
            self.clock.boottime = 3000
        self.opens(routes)

    def forget_links(self) -> None:
        self.places = {at: one for at, one in self.places.items() if one in self.reference.card}
        if self.inherited:  # these routes were there for so short a time that nobody has put it down
            for route in self.routes:
                self.reference.owed[route] -= self.inherited
            self.reference.owed[NOBODY] = self.inherited
        for work in self.paused.values():
            work.close()
        self.paused.clear()
        for far in self.far.values():
            far.let_go()
            far.up = far.durable = False
            far.newest.clear()
        for boots in self.nodes.values():
            for boot in boots:
                boot.sent = boot.acked + 1

    @precondition(lambda self: not self.paused)
    @rule(routes=some_routes)
    def a_restart(self, routes: str) -> None:
        self.acknowledge()
        self.runner.run(self.spool.__aexit__(None, None, None))
        self.forget_links()
        if self.is_disk_full:
            self.reference.crash()
            self.known = {node: {b: set(seqs) for b, seqs in boots.items()} for node, boots in self.saved_known.items()}
        self.opens(routes)

    # What always holds.

    @invariant()
    def nobody_is_let_down(self) -> None:
        self.note_own_records()
        self.acknowledge()
        for route in {*self.routes, *self.reference.owed} - {NOBODY}:
            lost = self.reference.let_down(route, self.readable(route), self.named(route))
            assert not lost, f"acknowledged, and {route} will never get {sorted(lost)}"

    @invariant()
    def nothing_is_given_up_without_need(self) -> None:
        """A new entry in the ledger tells the truth: who was owed something, and it was too old or too much."""
        for event in self.ledger():
            if event in self.told:
                continue
            self.told.add(event)
            SEEN[event.why.split(":")[0]] += 1
            word, ids = event.why.split(":")[0], ids_of_event(event)
            assert word != "damaged on the card", event
            concerned = [route for route in self.reference.owed if concerns(event, route)]
            if word in ("expired", "given up"):  # a replay may be refused too
                lacking = [one for one in ids if any(self.lacks(route, one) for route in concerned)]
                assert ids == set(lacking), f"{event}: but they have {sorted(ids - set(lacking))}"
            if word == "expired":
                oldest = max(self.reference.taken_at[one] for one in ids)
                assert self.age - oldest > ROUTES[event.why.split()[-1]].ttl_ms, event
            if event.why.startswith("given up: max_age"):
                ages = [self.age - self.reference.taken_at[one] for one in ids]
                assert min(ages) > min(limit.max_age_ms for limit in self.limits.values()), event
            if (
                event.why.startswith("given up: max_bytes")
                and " of lane" not in event.why
                and "removed" not in event.why
            ):
                assert event.node != GATEWAY and event.first % URGENT_EVERY, f"{event}: an alarm before the rest"

    def lacks(self, route: str, one: str) -> bool:
        return one in self.reference.owed[route] and one not in self.reference.remembered.get(route, ())

    @invariant()
    def marks_cover_only_what_came(self) -> None:
        for (node, _, boot), upto in self.spool.known():
            assert set(range(upto + 1)) <= self.known.get(node, {}).get(boot, set())

    @invariant()
    def memory_is_bounded(self) -> None:
        own = sum(
            1 for lane in self.spool.queue.lanes.values() for one in lane.read(lane.committed, 10**6) if one.event
        )
        assert self.spool.queue.waiting - own <= self.terms["stage_readings"]

    @invariant()
    def what_waits_is_due_sometime(self) -> None:
        if self.pending and self.terms["ack_when"] == "durable" and not self.is_writing:
            due = self.spool.queue.due_ms()
            assert due is not None and due <= self.spool.queue.age_ms() + 60_000

    # The end of it all.

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None and hasattr(self, "spool"):
                self.everything_is_delivered()
        finally:
            if hasattr(self, "spool"):
                for work in self.paused.values():
                    work.close()
                self.card.log.close()
                self.runner.close()
                shutil.rmtree(self.folder)

    def everything_is_delivered(self) -> None:
        """A last crash; then every node repeats what it was not acknowledged, and every route takes what there is."""
        self.is_disk_full = False
        self.crashes(sorted(ROUTES), power=False)
        for route in ROUTES:
            self.link(route, durable=True)
        for _ in range(200):
            self.nodes_repeat()
            finish(self.spool._commit())
            moved = self.deliver()
            self.nobody_is_let_down()
            if not moved and all(boot.acked + 1 >= boot.made for boots in self.nodes.values() for boot in boots):
                break
        else:
            raise AssertionError("it does not end")
        for route in ROUTES:
            assert not self.spool.backlog(route)
            lost = self.reference.let_down(route, set(), self.named(route))
            assert not lost, f"at the end {route} has not got {sorted(lost)}"
        stored = self.reference.acked
        for node, boots in self.nodes.items():
            for boot in boots:
                for seq in range(boot.made):
                    one = f"{node}.{INSTALL}.{boot.number}.{seq}"
                    assert one in stored or one in self.named("a"), f"{one} was never accounted for"

    def nodes_repeat(self) -> None:
        for node in NODES:
            boot = self.sending(node)
            boot.sent = boot.acked + 1
            while boot.sent < boot.made and self.intake(node, boot, boot.sent, 1):
                boot.sent += 1

    def deliver(self) -> bool:
        moved = False
        for route in self.routes:
            for kind in KINDS:
                while any(self.spool.unsent(route)):
                    before = self.spool.unsent(route)
                    finish(self.taking(route, kind, 7))
                    while self.far[route].windows[kind]:
                        moved = True
                        self.confirm(route, self.far[route].windows[kind].popleft())
                    if self.spool.unsent(route) == before:
                        break
        return moved


def prove(examples: int, steps: int, **more: Any) -> None:
    fieldpost.spool.RETRY_COMMIT_S = 0.0
    logging.disable()
    try:
        run_state_machine_as_test(
            Gateway,
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                print_blob=True,
                database=None,
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
                **more,
            ),
        )
    finally:
        fieldpost.spool.RETRY_COMMIT_S = 2.0
        for module in DRAW:
            sys.modules[f"fieldpost.spool.{module}"].secrets = secrets  # type: ignore[attr-defined]
        logging.disable(logging.NOTSET)


CI: dict[str, Any] = {"derandomize": True, "phases": [Phase.generate]}
"""The same examples each time; to make a failing one short takes minutes, and is done by hand."""

CORNERS = (
    "acknowledged without the card",
    "a write that failed",
    "dropped by the node",
    "expired",
    "given up",
    "replayed",
    "sent again, not having been confirmed",
    "sent as backfill",
    "sent thinned",
    "set aside",
)


def test_whatever_happens_what_was_acknowledged_is_delivered_or_named() -> None:
    prove(15, 30, **CI)


@pytest.mark.slow
def test_whatever_happens_for_longer_what_was_acknowledged_is_delivered_or_named() -> None:
    prove(250, 60, **CI)
    assert [corner for corner in CORNERS if not SEEN[corner]] == []


def report(examples: int, steps: int, chosen: int, took_s: float) -> str:
    lines = [
        "# The spool against plain sets of ids",
        "",
        f"{time.strftime('%Y-%m-%d %H:%M')}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, Python "
        f"{platform.python_version()}, SQLite {sqlite3.sqlite_version}. Written by `make prove`",
        f"(`python -m tests.edge.test_spool_model --seed {chosen}`): {examples:,} runs of up to {steps} steps in "
        f"{took_s:.0f} s; nobody was let down.",
        "",
        "| in them | times |",
        "|---|---|",
    ]
    return "\n".join([*lines, *(f"| {what} | {times:,} |" for what, times in SEEN.most_common())]) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    chosen = parser.parse_args()
    print(f"seed {chosen.seed}", flush=True)
    began = time.monotonic()
    seed(chosen.seed)(Gateway)
    prove(chosen.examples, chosen.steps)
    told = report(chosen.examples, chosen.steps, chosen.seed, time.monotonic() - began)
    Path(__file__).with_name("MODEL.md").write_text(told)
    print(told)
