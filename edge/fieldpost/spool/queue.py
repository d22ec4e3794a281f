"""What the spool decides, without doing any of it: a state machine over what it is told.

It numbers readings, knows which are safe and where each route has got to, and says what the next transaction must
write and when. `Spool` carries it out in its thread; the tests do so by hand, with a clock of their own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from ..clock import Clock, Eras
from ..reading import GATEWAY, Event, Manifest, Quality, Reading
from .marks import Key, Marks
from .progress import Flight, Progress, Span
from .rows import Commit, Ids, Info, Opened, Prunable, Refusal, Refused, Write, ids_of
from .stage import Lane, LaneName
from .thin import thin

COMMIT_LIMIT = 50_000
"""Readings of one commit: bounds the memory and the time that a transaction takes."""

BATCH_LIMIT = 8_192
"""Readings of one row: bounds what must be in memory to read a few of them."""

HURRIED_LINGER_MS = 10
"""What a node that waits for its ack does not notice, and a busy gateway gathers hundreds of readings in."""

HURRY_READINGS = 512
"""With so many gathered a commit costs each of them little; while every uplink is down a hurry waits for them."""

LAZY_MS = 900_000
"""How long what is safe upstream, or need only be noted, may wait to be written: it costs nothing but a replay, or
repeats with the same id after a crash."""

GATHERED_GRACE_MS = 5_000
"""What the far side may take to confirm what a route has gathered."""

NOBODY = ""
"""The id under which the progress is kept while there is no route."""

NEVER = 1 << 55
"""A position that none reaches."""

PRUNE_EVERY_MS = 2_000
"""How often a commit also looks for what need not be kept any longer."""

SAVE_PROGRESS_EVERY = 20_000
"""Confirmed readings after which a fast drain notes how far it is."""


@dataclass(frozen=True, slots=True)
class RouteTerms:
    """What the spool knows of a route. `ttl_ms`: readings older than this are not sent any more; 0: never.
    `gather_ms`: fresh readings may wait so long for others before they are sent."""

    id: str
    batch_readings: int = 500
    ttl_ms: int = 0
    gather_ms: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """What may be stored in one lane. 0: no limit."""

    max_bytes: int = 0
    max_age_ms: int = 0


@dataclass(frozen=True, slots=True)
class Terms:
    """How the queue is to behave; `config.SpoolConfig` explains each."""

    linger_ms: int = 5_000
    event_linger_ms: int = 1_000
    lazy_ms: int = LAZY_MS
    stage_readings: int = 20_000
    keep_ms: int = 7 * 86_400_000
    write: str = "when-needed"
    ack_when: str = "durable"
    full: str = "thin"
    limits: Mapping[LaneName, Limits] = field(default_factory=dict)


class Ticket(NamedTuple):
    """What was taken so far, in each lane: it is safe when everything before both positions is."""

    urgent: int
    bulk: int


@dataclass(slots=True)
class _Link:
    """What is known of a route's uplink."""

    up: bool = False
    durable: bool = False


class Queue:
    """The spool's mind."""

    def __init__(
        self, opened: Opened, terms: Terms, routes: Sequence[RouteTerms], clock: Clock, *, card_keeps: bool = True
    ) -> None:
        self.terms = terms
        self.routes = {route.id: route for route in routes}
        self.card_keeps = card_keeps
        self._clock = clock
        self._age_base = _age_base(opened, clock)
        self.eras = Eras(opened.eras)
        self.generation, self.boot, self._session = opened.generation, opened.boot, opened.session
        self.marks = Marks()
        for key, upto, beyond in opened.marks:
            self.marks.load(key, upto, beyond)
        self.lanes = {name: Lane(name, opened.heads[name], terms.stage_readings) for name in LaneName}
        self.links = {route: _Link() for route in self.routes}
        self.manifests: dict[str, Manifest] = {manifest.hash: manifest for manifest in opened.manifests}
        self._work = Write()
        self.reading: list[tuple[LaneName, int, int]] = []
        self._begin_progress(opened)
        self.counts = dict(opened.counts)
        self.set_aside_count = opened.set_aside
        self.repeats = self.commits = self.taken = self.replacements = 0
        self._event_seq = 0
        self._dirty_routes: set[tuple[str, LaneName]] = set(self.progress)
        self._confirmed_unsaved = 0
        self._last_commit_ms = self.age_ms()
        self._pruned_ms = self._last_commit_ms - PRUNE_EVERY_MS
        self._at_once = False
        self._hurried_ms: int | None = None
        self._given_up: dict[tuple[str, str, str, int], list[tuple[int, int]]] = {}
        self.observe_clock()
        self._tell_damage(opened)

    def _tell_damage(self, opened: Opened) -> None:
        for aside in opened.aside:
            self.report(Event("gap", GATEWAY, self._session, 0, 0, None, f"damaged on the card: {aside}"))
        for (lane, first, past), ids in opened.missing:
            self.damaged(lane, first, past, ids)

    def begin_again(self, opened: Opened) -> None:
        """The file was set aside while we ran, and a new one begun with what could be read: write the rest anew."""
        self.generation = opened.generation
        self.marks.write_all()
        for manifest in self.manifests.values():
            self._work_state(f"manifest/{manifest.hash}", manifest)
        self._work_state("eras", self.eras.known)
        self._dirty_routes |= set(self.progress)
        for route, name in self.removed:
            self._note_removed(route, name)
        self._tell_damage(opened)

    def _begin_progress(self, opened: Opened) -> None:
        """Where each route goes on. A route that is new takes up where another is known: now; the first one ever
        takes everything. A route that is not configured any more keeps what it had not sent, for when it comes back.
        Without any route, NOBODY wants everything: it is stored, and not given up without a word.
        """
        self.progress: dict[tuple[str, LaneName], Progress] = {}
        self.removed: dict[tuple[str, LaneName], Progress] = {}
        known = {route for route, _ in opened.progress if route != NOBODY}
        for name, lane in self.lanes.items():
            for route in self.routes or (NOBODY,):
                before = opened.progress.get((route, name))
                nobodys = opened.progress.get((NOBODY, name))
                if before is None:
                    before = nobodys
                elif before[0] is None and nobodys is not None and nobodys[0] is not None:
                    # It was not configured, and for a while nobody was: what came then is for it as well.
                    since, spans = nobodys
                    before = (since, [*before[1], *spans])
                if before is None:
                    start = lane.head if known and not opened.is_doubtful else opened.oldest[name]
                    self.progress[route, name] = Progress(start)
                    continue
                live, spans = before
                self.progress[route, name] = Progress(lane.head if live is None else min(live, lane.head), list(spans))
            for route in known - set(self.routes):
                live, spans = opened.progress.get((route, name), (None, []))
                left = Progress(lane.head if live is None else min(live, lane.head), spans)
                left.set_back(lane.head)
                left.live = NEVER  # what comes from now on is not for it
                self.removed[route, name] = left
                if live is not None:
                    self._note_removed(route, name)
            if self.routes and (NOBODY, name) in opened.progress:
                self._work.state[f"route/{NOBODY}/{int(name)}"] = None

    def _note_removed(self, route: str, name: LaneName) -> None:
        left = self.removed[route, name]
        self._work_state(f"route/{route}/{int(name)}", (None, left.spans))

    def _work_state(self, key: str, value: object) -> None:
        self._work.state[key] = msgspec.msgpack.encode(value)

    # The clocks.

    def age_ms(self) -> int:
        """The spool's own clock: it never steps, goes on over restarts, and stands still while the machine is off."""
        return self._age_base + self._clock.boottime_ms()

    def observe_clock(self, synced: bool | None = None) -> bool:
        """Look at the clocks; True where the wall clock was set or became trusted."""
        clock = self._clock
        if synced is None:
            synced = clock.synchronised()
        era = self.eras.observe(clock.kernel_boot(), clock.boottime_ms(), clock.unix_ms(), synced)
        if era is not None:
            self._work_state("eras", self.eras.known)
        return era is not None

    def dated(self, readings: list[Reading]) -> list[Reading]:
        """Readings with the best date that is known now, and what it rests on."""
        eras = self.eras
        if all(eras.is_synced(reading.era) or reading.quality == Quality.ANCHORED for reading in readings):
            return readings
        return [self._redated(reading) for reading in readings]

    def _redated(self, reading: Reading) -> Reading:
        if reading.quality == Quality.ANCHORED or self.eras.is_synced(reading.era):
            return reading
        by = self.eras.correction_ms(reading.era)
        bounded = reading.quality == Quality.BOUNDED
        if by is None:
            quality = Quality.BOUNDED if bounded else Quality.UNSYNCED
            return reading if reading.quality == quality else msgspec.structs.replace(reading, quality=quality)
        quality = Quality.BOUNDED if bounded else Quality.CORRECTED
        return msgspec.structs.replace(reading, time_ms=reading.time_ms + by, quality=quality)

    # What comes in.

    @property
    def waiting(self) -> int:
        """Readings that are in memory only."""
        return sum(lane.waiting for lane in self.lanes.values())

    @property
    def room(self) -> int:
        """How many readings the stage can still take."""
        return max(0, self.terms.stage_readings - self.waiting)

    @property
    def ticket(self) -> Ticket:
        """Everything that was taken so far."""
        return Ticket(self.lanes[LaneName.URGENT].head, self.lanes[LaneName.BULK].head)

    def append(self, readings: Iterable[Reading], urgent: Collection[int] = ()) -> Ticket:
        """Take readings that are new by identity; those whose seq is in `urgent` overtake the others."""
        now = self.age_ms()
        bulk, fast = self.lanes[LaneName.BULK], self.lanes[LaneName.URGENT]
        for run in _runs(readings):
            one = run[0]
            fresh = self.marks.take((one.node, one.install, one.boot), one.seq, run[-1].seq)
            if len(fresh) != 1 or fresh[0] != (one.seq, run[-1].seq):
                count, run = len(run), [row for row in run if any(a <= row.seq <= b for a, b in fresh)]
                self.repeats += count - len(run)
            self.taken += len(run)
            if not urgent:
                bulk.put_all(run, now)
                continue
            for row in run:
                (fast if row.seq in urgent else bulk).put(row, now)
                self._at_once |= row.seq in urgent
        return self.ticket

    def mark(self, key: Key, first: int, last: int) -> list[tuple[int, int]]:
        """Rows `first..last` of a boot need not come any more; returns those that had not come before."""
        return self.marks.take(key, first, last)

    def report(self, event: Event, manifest: str = "", values: tuple[int | str | None, ...] = ()) -> None:
        """Say something upstream as a record of the gateway's own; a discard goes into the ledger as well."""
        record = self.record(event)
        if event.kind != "presence":
            self.note(event)
        self.lanes[LaneName.URGENT].put(record, self.age_ms())

    def record(self, event: Event) -> Reading:
        """A record of the gateway's own, numbered."""
        seq, self._event_seq = self._event_seq, self._event_seq + 1
        at = self._clock.unix_ms()
        era = self.eras.now.number if self.eras.known else 0
        uptime = self._clock.boottime_ms()
        return Reading(GATEWAY, self._session, self.boot, seq, uptime, at, 0, "", (), event, Quality.SYNCED, era)

    def note(self, event: Event) -> None:
        """Put a discard into the ledger."""
        self._work.ledger.append((self._clock.unix_ms(), event))
        word = event.why.split(":")[0]
        self.counts[word] = self.counts.get(word, 0) + 1
        self._work_state("counts", self.counts)

    def keep_manifest(self, manifest: Manifest) -> None:
        """Remember what a hash means, before any reading that names it is appended."""
        if manifest.hash not in self.manifests:
            self.manifests[manifest.hash] = manifest
            self._work_state(f"manifest/{manifest.hash}", manifest)

    # What is safe.

    def safe(self, name: LaneName) -> int:
        """Everything before this position of a lane may be acknowledged."""
        lane = self.lanes[name]
        if self.card_keeps:
            safe = self._unwritten(lane)
        else:
            durable = self.routes and all(link.durable for link in self.links.values())
            safe = self._confirmed(name, min) if durable else 0
        if self.terms.ack_when == "any-uplink":
            safe = min(safe, self._confirmed(name, max))
        elif self.terms.ack_when == "all-uplinks":
            safe = min(safe, self._confirmed(name, min))
        return safe

    def is_safe(self, ticket: Ticket) -> bool:
        """Whether everything of a ticket is safe."""
        return self.safe(LaneName.BULK) >= ticket.bulk and self.safe(LaneName.URGENT) >= ticket.urgent

    def _confirmed(self, name: LaneName, which: object) -> int:
        ends = [self.progress[route, name].outstanding() for route in self.routes]
        if not ends:
            return self.lanes[name].head
        return max(ends) if which is max else min(ends)

    def _unwritten(self, lane: Lane) -> int:
        """The first position that is neither on the card nor confirmed to every route by what keeps it."""
        if not self.routes or self.terms.write == "always" or lane.write_to > lane.committed:
            return lane.committed
        return min(self.progress[route, lane.name].outstanding(lane.committed) for route in self.routes)

    # When to write, and what.

    def hurry(self) -> None:
        """A node's window is half used: it will soon have to wait for us."""
        if self._hurried_ms is None:
            self._hurried_ms = self.age_ms()

    def due_ms(self) -> int | None:
        """When the next commit is to be made, by the spool's clock; None: nothing waits."""
        due: list[int] = []
        now = self.age_ms()
        for lane in self.lanes.values():
            unwritten = self._unwritten(lane)
            if unwritten < lane.head:
                due.append(lane.taken_ms(unwritten) + self.linger_ms(lane.name))
                if self._at_once:
                    due.append(now)
            elif lane.committed < lane.head:
                due.append(lane.taken_ms(lane.committed) + self.terms.lazy_ms)
        if due and self._hurried_ms is not None and self._may_hurry():
            due.append(self._hurried_ms + HURRIED_LINGER_MS)
        if self.is_large:
            due.append(now)
        if self._work.state or self._work.ledger or self._work.refused or self._work.deleted:
            due.append(self._last_commit_ms + (self.terms.event_linger_ms if self._presses() else self.terms.lazy_ms))
        if self._dirty_routes:
            due.append(self._last_commit_ms + self.terms.lazy_ms)
        if self._confirmed_unsaved >= SAVE_PROGRESS_EVERY:
            due.append(now)
        return min(due, default=None)

    def linger_ms(self, name: LaneName) -> int:
        """How long a reading may wait to be written. What a route gathers for uplinks that keep it is on its way to a
        safe place: its nodes hold on to it so much longer, and it need not be written meanwhile."""
        if name is LaneName.URGENT:
            return self.terms.event_linger_ms
        gathered = max((route.gather_ms for route in self.routes.values()), default=0)
        if gathered and self.terms.write == "when-needed" and all(link.durable for link in self.links.values()):
            return max(self.terms.linger_ms, gathered + GATHERED_GRACE_MS)
        return self.terms.linger_ms

    def _presses(self) -> bool:
        return bool(self._work.ledger or self._work.refused or self._work.deleted)

    def _may_hurry(self) -> bool:
        """Freshness is worth a commit only while somebody upstream listens who does not keep readings himself.

        What uplinks that keep them are about to confirm needs no card.
        """
        if any(link.up and not link.durable for link in self.links.values()):
            return True
        keep = bool(self.routes) and all(link.durable for link in self.links.values())
        unsafe = sum(lane.head - self._unwritten(lane) for lane in self.lanes.values())
        return unsafe >= HURRY_READINGS and not (keep and self.terms.write == "when-needed")

    @property
    def is_large(self) -> bool:
        """So much has gathered that waiting for more gains nothing."""
        return self.waiting >= min(COMMIT_LIMIT, self.terms.stage_readings) // 2

    def plan(self) -> Commit:
        """What the next transaction writes. Tell `done` or `failed` what has become of it, before the next one."""
        self._tell_given_up()
        self._hurried_ms, self._at_once = None, False
        now = self.age_ms()
        writes, left = [], COMMIT_LIMIT
        ends = {}
        for name, lane in self.lanes.items():
            if not self.terms.keep_ms and self.terms.write == "when-needed":
                # Safe upstream, and nobody wants it for later: it need never be written.
                lane.commit(min(self._unwritten(lane), lane.head))
            readings = lane.read(lane.committed, left)
            left -= len(readings)
            ends[name] = lane.committed + len(readings)
            for at in range(0, len(readings), BATCH_LIMIT):
                writes.append((name, lane.committed + at, readings[at : at + BATCH_LIMIT]))
        # Marks must not run ahead of readings that a crash would take: they are saved with the whole stage only.
        whole = all(ends[name] == lane.head for name, lane in self.lanes.items())
        changes = self.marks.changes() if whole else ([], [])
        self._settle_thinned()
        work, self._work = self._work, Write()
        state: dict[str, bytes | None] = dict(work.state)
        for (node, install, boot), upto, beyond in changes[0]:
            state[f"mark/{node}/{install}/{boot}"] = msgspec.msgpack.encode((upto, beyond))
        for node, install, boot in changes[1]:
            state[f"mark/{node}/{install}/{boot}"] = None
        dirty, self._dirty_routes = self._dirty_routes, set()
        for route, name in dirty:
            # What is confirmed but not on the card is outstanding after a crash, under positions given again.
            saved = self.progress[route, name].saved(ends[name])
            state[f"route/{route}/{int(name)}"] = msgspec.msgpack.encode(saved)
        state["clock"] = msgspec.msgpack.encode((now, self._clock.boottime_ms(), self._clock.kernel_boot()))
        if writes:
            state["heads"] = msgspec.msgpack.encode([ends[name] for name in LaneName])
        return Commit(
            batches=writes,
            ends=ends,
            at_ms=now,
            state=state,
            work=work,
            marks=changes,
            dirty=dirty,
            prune=self._prunable(ends) if now - self._pruned_ms >= PRUNE_EVERY_MS else {},
            confirmed_unsaved=self._confirmed_unsaved,
        )

    def _prunable(self, ends: Mapping[LaneName, int]) -> dict[LaneName, Prunable]:
        """What somebody still wants of each lane, and the age before which the rest was kept long enough."""
        oldest = self.age_ms() - self.terms.keep_ms
        return {name: Prunable(self.wanted(name), ends[name], oldest) for name in LaneName}

    def wanted(self, name: LaneName) -> list[tuple[int, int]]:
        """Everything that some route has yet to confirm, removed routes included."""
        head = self.lanes[name].head
        return sorted({piece for (_, lane), p in self.everyone() if lane is name for piece in p.pieces(head)})

    def everyone(self) -> list[tuple[tuple[str, LaneName], Progress]]:
        """The progress of every route, in every lane, removed routes included."""
        return [*self.progress.items(), *self.removed.items()]

    def done(self, commit: Commit) -> None:
        """A commit is on the card."""
        self.commits += 1
        self._last_commit_ms = self.age_ms()
        if commit.prune:
            self._pruned_ms = self._last_commit_ms
        self._confirmed_unsaved -= commit.confirmed_unsaved
        for name, lane in self.lanes.items():
            lane.commit(max(lane.committed, commit.ends[name]))
            lane.forget(self._stage_wanted(name))
            # Progress that was cut at the card's end can be saved further now only with the next commit.
            for route in self.routes:
                progress = self.progress[route, name]
                if (route, name) in commit.dirty and progress.saved(lane.committed) != progress.saved(lane.head):
                    self._dirty_routes.add((route, name))

    def failed(self, commit: Commit) -> None:
        """A commit was not made: all of it is to be written again."""
        self.marks.put_back(commit.marks)
        for _, event in commit.work.ledger:
            if event.kind == "thinned":  # it is said again, when it is tried again
                self.counts["thinned"] -= 1
        commit.work.ledger = [entry for entry in commit.work.ledger if entry[1].kind != "thinned"]
        self._work = commit.work.before(self._work)
        self._dirty_routes |= commit.dirty

    def _stage_wanted(self, name: LaneName) -> int:
        """From where some route will read the live end in memory; history is read from the card."""
        return min((self.progress[route, name].live for route in self.routes), default=self.lanes[name].committed)

    # What goes out.

    def link(self, route: str, *, up: bool, durable: bool = False) -> None:
        """A route's uplink came or went. After an outage fresh readings go first, and the rest is history."""
        link = self.links[route]
        was_up, link.up, link.durable = link.up, up, durable and up
        for name in LaneName:
            progress = self.progress[route, name]
            progress.let_go()
            if up and name is LaneName.BULK:
                head = self.lanes[name].head
                if head - progress.live > self.routes[route].batch_readings:
                    progress.set_back(head)
                    self._dirty_routes.add((route, name))
        if was_up and not up:
            self._at_once = True

    def unsent(self, route: str) -> tuple[int, int, int]:
        """How many positions can be sent: (urgent, live, history)."""
        urgent, bulk = self.progress[route, LaneName.URGENT], self.progress[route, LaneName.BULK]
        late = urgent.next_history()
        fast = self.lanes[LaneName.URGENT].head - urgent.next_live() + (late[1].past - late[0] if late else 0)
        history = bulk.next_history()
        return (
            fast,
            self.lanes[LaneName.BULK].head - bulk.next_live(),
            history[1].past - history[0] if history else 0,
        )

    def confirm(self, route: str, name: LaneName, flight: Flight) -> None:
        """The far side has a flight."""
        lane, progress = self.lanes[name], self.progress[route, name]
        progress.confirm(flight)
        self._dirty_routes.add((route, name))
        if not self.links[route].durable:
            lane.write_to = max(lane.write_to, flight.past)
        if flight.first < lane.committed:
            self._confirmed_unsaved += flight.past - flight.first
        lane.forget(self._stage_wanted(name))

    def skip(self, route: str, name: LaneName, first: int, past: int) -> None:
        """A route will never get these positions; whoever says so accounts for them."""
        self.progress[route, name].skip(first, past)
        self._dirty_routes.add((route, name))

    def replay(self, route: str, name: LaneName, wanted: Span) -> int:
        """Send again what is on the card; returns how many positions that are."""
        added = self.progress[route, name].replay(wanted)
        self._dirty_routes.add((route, name))
        return sum(span.past - span.first for span in added)

    # What is given up.

    def damaged(self, name: LaneName, first: int, past: int, ids: Ids) -> None:
        """Positions whose bytes on the card are not what was written."""
        for (_, lane), progress in self.everyone():
            if lane is name:
                progress.skip(first, past)
        self._dirty_routes |= {key for key in self.progress if key[1] is name}
        for node, install, boot, low, high in ids:
            self.report(Event("gap", node, install, boot, low, high, "damaged on the card"))
        if not ids:
            at = f"damaged on the card: lane {name.name.lower()}"
            self.report(Event("gap", GATEWAY, self._session, self.boot, first, past - 1, at))

    def expire(self, route: str, name: LaneName, first: int, past: int, readings: Sequence[Reading]) -> None:
        """These readings are too old for a route's `ttl`."""
        self.skip(route, name, first, past)
        for node, install, boot, low, high in ids_of(readings):
            self.report(Event("gap", node, install, boot, low, high, f"expired: route {route}"))

    def wanted_by(self, info: Info) -> list[str]:
        """The configured routes (or NOBODY) for which something of a batch is outstanding."""
        return [
            route
            for (route, lane), progress in self.progress.items()
            if lane is info.lane and progress.touches(info.first, info.past)
        ]

    def is_wanted(self, info: Info) -> bool:
        """Whether some route, removed ones included, has yet to get something of a batch."""
        return any(p.touches(info.first, info.past) for (_, lane), p in self.everyone() if lane is info.lane)

    def is_busy(self, info: Info) -> bool:
        """Whether a batch is partly sent or on its way: it can't be changed just now."""
        return self.is_flying(info) or any(
            p.is_inside(info.first, info.past) for (_, lane), p in self.everyone() if lane is info.lane
        )

    def is_flying(self, info: Info) -> bool:
        """Whether something of a batch is on its way, or (`reading`) being read for that."""
        flying = [(lane, one.first, one.past) for (_, lane), p in self.progress.items() for one in p.flying]
        return any(
            lane is info.lane and first < info.past and past > info.first
            for lane, first, past in [*flying, *self.reading]
        )

    def thin(self, info: Info, readings: list[Reading]) -> None:
        """Put records with minimum, maximum, mean and count in the place of a batch's rows, with the next commit."""
        self._work.replaced.append((info, thin(readings, self.manifests, self.record)))
        self.lanes[info.lane].forget(info.past)  # routes read it from the card from now on, as it will be there

    def _settle_thinned(self) -> None:
        """What a route has begun with meanwhile stays: it could not go on in the middle of records."""
        work = self._work
        work.replaced = [(info, thinned) for info, thinned in work.replaced if not self.is_busy(info)]
        self.replacements += len(work.replaced)
        for _, thinned in work.replaced:
            records = [one for one in thinned if one.event is not None and one.event.kind == "thinned"]
            for node, install, boot, low, high in ids_of(records):
                self.note(Event("thinned", node, install, boot, low, high, "thinned: minimum, maximum, mean and count"))

    def give_up(self, info: Info, readings: list[Reading], why: str) -> None:
        """Delete a batch; what some route still wanted of it becomes gap records with the next commit."""
        whose = [route for (route, lane), p in self.everyone() if lane is info.lane and p.lacks(info.first, info.past)]
        lost = [
            reading
            for at, reading in enumerate(readings)
            if any(
                p.lacks(info.first + at, info.first + at + 1) for (_, lane), p in self.everyone() if lane is info.lane
            )
        ]
        some = f" (route {', '.join(whose)})" if whose and not set(self.routes) <= set(whose) else ""
        for (_, lane), progress in self.everyone():
            if lane is info.lane:
                progress.skip(info.first, info.past)
        self._dirty_routes |= {key for key in self.progress if key[1] is info.lane}
        for route, lane in self.removed:
            if lane is info.lane:
                self._note_removed(route, lane)
        for node, install, boot, low, high in ids_of(lost):
            known = self._given_up.setdefault((f"given up: {why}{some}", node, install, boot), [])
            if known and known[-1][1] + 1 == low:
                known[-1] = (known[-1][0], high)
            else:
                known.append((low, high))
        self._work.deleted.append(info)

    def _tell_given_up(self) -> None:
        """One record for what several batches had of a boot: many small ones must not cost what they free."""
        given_up, self._given_up = self._given_up, {}
        for (why, node, install, boot), ranges in given_up.items():
            for low, high in ranges:
                self.report(Event("gap", node, install, boot, low, high, why))

    def forget_delivered(self, info: Info) -> None:
        """Delete a batch that every route has confirmed."""
        self._work.deleted.append(info)

    def set_aside(self, route: str, reading: Reading, reason: str) -> None:
        """`route`'s far side refused this reading for good: keep it to be looked at, and say so upstream."""
        for lane in self.lanes.values():
            lane.write_to = lane.head  # who was refused is known here only: nothing is safe before that is written
        self._work.refused.append(Refusal(self._clock.unix_ms(), route, reason[:500], reading))
        self.set_aside_count += 1
        if reading.event is None:  # never a gap record about a refused gap record: that would not end
            why = f"set aside: {route}: {reason}"[:200]
            self.report(Event("gap", reading.node, reading.install, reading.boot, reading.seq, reading.seq, why))

    def settled(self, refused: Refused, *, dropped: bool) -> None:
        """A person has dealt with a reading that was set aside: delivered after all, or dropped."""
        self._work.settled.append(refused.id)
        self.set_aside_count -= 1
        reading = refused.reading
        if dropped and reading.event is None:
            why = f"dropped by hand: {refused.route}"
            self.note(Event("gap", reading.node, reading.install, reading.boot, reading.seq, reading.seq, why))


def _runs(readings: Iterable[Reading]) -> Iterator[list[Reading]]:
    """Rows of one boot whose seqs follow on each other."""
    run: list[Reading] = []
    for row in readings:
        if run and (
            row.seq != run[-1].seq + 1
            or row.boot != run[-1].boot
            or row.install != run[-1].install
            or row.node != run[-1].node
        ):
            yield run
            run = []
        run.append(row)
    if run:
        yield run


def _age_base(opened: Opened, clock: Clock) -> int:
    """What makes CLOCK_BOOTTIME the spool's clock: it goes on where it stood, by the time between where known."""
    age, boottime, kernel_boot = opened.clock
    if kernel_boot == clock.kernel_boot():
        return age - boottime
    return age - clock.boottime_ms()
