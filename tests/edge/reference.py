"""What the spool owes, kept as plain sets of ids: the judge of test_spool_model.py.

It knows nothing of positions, spans, marks or stages. It is told what came in, what was acknowledged, what is on the
card, who has confirmed what, and what was given up under which name; and it says who was let down.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from fieldpost.reading import GATEWAY, Event, Reading

NOBODY = ""
"""Stands for the routes that there will be, while there is none."""


def ids_of_event(event: Event) -> set[str]:
    """The rows that a gap or a thinned record stands for."""
    if event.kind == "presence" or event.last is None:
        return set()
    return {f"{event.node}.{event.install}.{event.boot}.{seq}" for seq in range(event.first, event.last + 1)}


def ids_in(readings: Iterable[Reading]) -> set[str]:
    """Whom one has who has these: the readings themselves, and the rows that a thinned record stands for."""
    found = set()
    for reading in readings:
        found.add(reading.id)
        if reading.event is not None and reading.event.kind == "thinned":
            found |= ids_of_event(reading.event)
    return found


def content(reading: Reading) -> tuple[object, ...]:
    """What must not change on the way: everything but the date, which may be learned later."""
    return reading.id, reading.uptime_ms, reading.manifest, reading.values, reading.event


class Reference:
    """Who is owed what, by id."""

    def __init__(self) -> None:
        self.taken: dict[str, tuple[object, ...]] = {}
        self.order: dict[str, tuple[str, int, int]] = {}
        self.taken_at: dict[str, int] = {}
        self.owed: dict[str, set[str]] = {}
        self.acked: set[str] = set()
        self.card: set[str] = set()  # what was ever on the card
        self.written_at: dict[str, int] = {}
        self.confirmed: dict[str, set[str]] = {}  # what a far side has said that it has
        self.remembered: dict[str, set[str]] = {}  # the same, as far as the gateway knows it after its last crash
        self.saved: dict[str, set[str]] = {}  # the same, as of the last commit
        self.durable: dict[str, set[str]] = {}

    def take(self, reading: Reading, routes: Iterable[str], now_ms: int) -> None:
        """A reading came in, and these routes want it."""
        self.taken[reading.id] = content(reading)
        self.order[reading.id] = (reading.node, reading.boot, reading.seq)
        self.taken_at[reading.id] = now_ms
        for route in list(routes) or [NOBODY]:
            self.owed.setdefault(route, set()).add(reading.id)

    def write(self, on_card: set[str], now_ms: int) -> None:
        """A commit was made; this is what is on the card."""
        for one in on_card - self.card:
            self.written_at[one] = now_ms
        self.card |= on_card
        self.saved = {route: set(ids) for route, ids in self.remembered.items()}

    def confirm(self, route: str, ids: set[str], *, durable: bool) -> None:
        """A far side has said that it has these; `durable`: and that it keeps them."""
        for sets in (self.confirmed, self.remembered, *([self.durable] if durable else [])):
            sets.setdefault(route, set()).update(ids)

    def crash(self) -> None:
        """The gateway knows only what is on the card; what was neither there nor promised is the node's again."""
        self.remembered = {route: set(ids) for route, ids in self.saved.items()}
        for ids in self.owed.values():
            ids &= self.card | self.acked

    def promised(self) -> set[str]:
        """What is nobody else's any more: the acknowledged rows, and the gateway's own records once they are kept."""
        return self.acked | {one for one in self.card if one.startswith(f"{GATEWAY}.")}

    def may_acknowledge(self, one: str, write: str, ack_when: str, named: dict[str, set[str]]) -> bool:
        """Whether a row is safe: on the card or with everybody who keeps it; and has come as far as was asked for.

        `named`: who was given up, for each of the routes that there are (for NOBODY, where there is none).
        """
        arrived = [
            one in gone or one in self.confirmed.get(route, ()) or one not in self.owed.get(route, ())
            for route, gone in named.items()
            if route != NOBODY
        ]
        far = {"durable": True, "any-uplink": any(arrived or [True]), "all-uplinks": all(arrived)}[ack_when]
        with_all = all(one in self.durable.get(route, ()) or one in gone for route, gone in named.items())
        given_up = all(one in gone for gone in named.values())
        return given_up or ((one in self.card or (with_all and write != "always")) and far)

    def let_down(self, route: str, readable: set[str], named: set[str]) -> set[str]:
        """Whom a route will never get, though it was promised, and nobody has said so."""
        owed = self.owed.get(route, set()) & self.promised()
        return owed - self.confirmed.get(route, set()) - readable - named


def concerns(event: Event, route: str) -> bool:
    """Whether a ledger's entry is about a route; most are about all of them."""
    if event.kind == "thinned":
        return False  # it must get the record that stands for the rows
    if named := re.match(r"(?:expired: route|set aside:) (\w+)", event.why):
        return named[1] == route
    if some := re.search(r" \(route ([\w, ]+)\)$", event.why):
        return route in some[1].split(", ")
    return True
