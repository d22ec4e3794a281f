"""What a spool owes after a power cut, and whether what was opened again has it.

`History` is what the world knows at a point of a trace; `View` what a spool says that was opened there. `owed` compares
them. No cleverness: sets of identities.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fieldpost.reading import GATEWAY, Reading
from fieldpost.spool import LaneName, RouteTerms, Terms
from fieldpost.spool.folder import born
from fieldpost.spool.log import Log
from fieldpost.spool.progress import Progress
from fieldpost.spool.queue import Queue
from spools import HandClock, spool_in, taken

from faults.recording import Image, lay_out
from faults.workload import ROUTES, Id, identity, row

EVERYTHING = 1 << 30


def spread(ranges: Iterable[Sequence[Any]]) -> set[Id]:
    """Ranges (node, install, boot, first, last) as identities."""
    return {(node, install, boot, seq) for node, install, boot, first, last in ranges for seq in range(first, last + 1)}


class History:
    """What has been said so far. `confirmed`: by whom, whether it keeps it itself or not."""

    def __init__(self) -> None:
        self.acked: set[Id] = set()
        self.dropped: set[Id] = set()
        self.held: set[Id] = set()
        self.refused: dict[str, set[Id]] = {route: set() for route in ROUTES}
        self.confirmed: dict[str, set[Id]] = {route: set() for route in ROUTES}
        self.kept_upstream: dict[str, set[Id]] = {route: set() for route in ROUTES}
        self.came_at: dict[Id, int] = {}
        self.age = 0
        self.keeps: list[int] = []
        self.presses = False

    def hear(self, said: dict[str, Any]) -> None:
        """The next mark of the trace."""
        self.age = said.get("age", self.age)
        for word in said:
            match word:
                case "ack":
                    self.acked |= spread([said["ack"]]) - self.dropped
                case "dropped":
                    self.dropped |= spread([said["dropped"]])
                case "held":
                    self.held |= spread([said["held"]])
                case "came":
                    for one in spread([said["came"]]):
                        self.came_at[one] = min(self.age, self.came_at.get(one, self.age))
                case "confirmed":
                    self.confirmed[said["confirmed"]] |= spread(said["ids"])
                    if said["durable"]:
                        self.kept_upstream[said["confirmed"]] |= spread(said["ids"])
                case "refused":
                    self.refused[said["refused"]] |= spread(said["ids"])
                case "opened":
                    self.keeps.append(said["keep_ms"])
                    self.presses = self.presses or said["presses"]

    def may_be_pruned(self, one: Id) -> bool:
        """Whether a reading that every route has may have been deleted: kept long enough, or no room for it."""
        return self.presses or self.age - self.came_at.get(one, self.age) >= min(self.keeps)


@dataclass(slots=True)
class View:
    """What a spool that was opened has. `faults`: what is wrong already without knowing any history."""

    stored: dict[Id, Reading] = field(default_factory=dict)
    outstanding: dict[str, set[Id]] = field(default_factory=dict)
    marked: set[Id] = field(default_factory=set)
    named: dict[str, set[Id]] = field(default_factory=dict)
    refused: dict[str, set[Id]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @property
    def all_named(self) -> set[Id]:
        """Every reading that the ledger or a record names."""
        return set().union(*self.named.values())

    @property
    def said(self) -> tuple[object, ...]:
        """What must be the same when it is opened once more."""
        return (list(self.stored), self.outstanding, self.marked, self.named, self.refused)


def look(folder: Path) -> View:
    """Open the spool in a folder as a gateway does, look at everything, and close it."""
    view, log, clock = View(), Log(folder), HandClock()
    opened = log.open()
    queue = Queue(opened, Terms(), [RouteTerms(route) for route in ROUTES], clock)
    view.faults += [f"set aside: {aside}" for aside in opened.aside]
    view.faults += [f"missing: {hole}" for hole in opened.missing]
    view.outstanding = {route: set() for route in ROUTES}
    view.refused = {route: set() for route in ROUTES}
    for lane in LaneName:
        _look_at_lane(view, log, queue, lane)
    for _, event in log.ledger(EVERYTHING):
        _name(view, event.why, event.node, event.install, event.boot, event.first, event.last)
    for one in log.refused():
        view.refused[one.route].add(identity(one.reading))
    for (node, install, boot), upto, beyond in opened.marks:
        view.marked |= spread((node, install, boot, a, b) for a, b in [(0, upto), *beyond])
    (damaged,) = log._opened().execute("SELECT count(*) FROM damaged").fetchone()
    if damaged:
        view.faults.append(f"{damaged} rows look damaged")
    log.close()
    return view


def _look_at_lane(view: View, log: Log, queue: Queue, lane: LaneName) -> None:
    newest: dict[tuple[str, str, int], int] = {}
    wanted = {route: _wanted(queue.progress[route, lane], queue.lanes[lane].head) for route in ROUTES}
    at = 0
    for info in log.infos(lane, 0, limit=-1):
        piece = log.read(lane, info.first, info.past, info.count)
        if piece.damage or len(piece.readings) != info.count:
            view.faults.append(f"unreadable: {info}")
        if info.first < at or info.past > queue.lanes[lane].head:
            view.faults.append(f"positions: {info} after {at}, head {queue.lanes[lane].head}")
        at = info.past
        for offset, one in enumerate(piece.readings):
            who = identity(one)
            if who in view.stored:
                view.faults.append(f"twice: {one.id}")
            key = (one.node, one.install, one.boot)
            if one.seq <= newest.get(key, -1) and not info.thinned:
                view.faults.append(f"out of order: {one.id} after {newest[key]}")
            newest[key] = one.seq
            if one.event is None and one != row(one.node, one.boot, one.seq):
                view.faults.append(f"not what was measured: {one}")
            view.stored[who] = one
            if one.event is not None and one.event.kind != "presence":
                e = one.event
                _name(view, e.why, e.node, e.install, e.boot, e.first, e.last)
            first, past = (info.first, info.past) if info.thinned else (info.first + offset, info.first + offset + 1)
            for route in ROUTES:
                if any(a < past and b > first for a, b in wanted[route]):
                    view.outstanding[route].add(who)


def _wanted(progress: Progress, head: int) -> list[tuple[int, int]]:
    """What a route has yet to confirm for the first time."""
    return [(span.first, span.past) for span in progress.spans if span.whole] + [(progress.live, head)]


def _name(view: View, why: str, node: str, install: str, boot: int, first: int, last: int | None) -> None:
    if node == GATEWAY and "damaged" in why:
        view.faults.append(f"told as damaged: {why}")
    view.named.setdefault(why.split(":")[0], set()).update(
        spread([(node, install, boot, first, first if last is None else last)])
    )


def owed(history: History, view: View) -> list[str]:
    """What is wrong with a view at a point of a history; nothing, where all is well."""
    faults = list(view.faults)
    named = view.all_named
    excused = named | history.dropped | history.held
    for one in sorted((history.acked | view.marked) - history.dropped - named):
        if one in view.stored:
            continue
        if one in history.held and one not in history.acked:
            continue
        for route in ROUTES:
            has = history.kept_upstream[route]
            if history.may_be_pruned(one):
                has = has | history.confirmed[route]
            if one not in has:
                faults.append(f"lost: {one}, which {route} has not")
                break
    for one in view.stored:
        for route in ROUTES:
            if (
                one not in view.outstanding[route]
                and one not in history.confirmed[route]
                and one not in excused
                and one not in view.refused[route]
            ):
                faults.append(f"skipped: {one} for {route}")
    for one in sorted((view.marked - set(view.stored) - named - history.held) & history.dropped):
        faults.append(f"marked, and nothing says that it was dropped: {one}")
    for word, ids in view.named.items():
        invented = ids - _may_be_named(history, word)
        if invented and not (word.startswith(("given up", "thinned", "expired")) and history.presses):
            faults.append(f"invented: {word}: {sorted(invented)[:5]}")
    return faults


def _may_be_named(history: History, word: str) -> set[Id]:
    if word == "dropped by the node":
        return history.dropped
    if word in ("set aside", "dropped by hand"):
        return set().union(*history.refused.values())
    return set()


def put(image: Image, folder: Path) -> Path:
    """An image in an empty folder, where its spool counts as the same file; returns the spool's folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lay_out(image, folder)
    spool = folder / "spool"
    was = image.born.get("spool/spool.db")
    marker = image.files.get("spool/spool.id")
    if was and marker and was.encode() in marker:
        (spool / "spool.id").write_bytes(marker.replace(was.encode(), born(spool / "spool.db").encode()))
    return spool


async def withheld(folder: Path, view: View) -> list[str]:
    """What a route is not given by a whole `Spool`, although its progress says so, or is given out of order."""
    faults = []
    async with spool_in(folder, *ROUTES, clock=HandClock()) as spool:
        for route in ROUTES:
            given = {identity(one): one for one in await taken(spool, route)}
            faults += [f"withheld: {one} from {route}" for one in sorted(view.outstanding[route] - given.keys())]
            faults += [f"from nowhere: {given[one]} for {route}" for one in sorted(given.keys() - view.stored.keys())]
    return faults
