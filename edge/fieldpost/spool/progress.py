"""How far a route has got in a lane: what it has yet to confirm, as a live end and spans of history.

A pure state machine over positions. Everything from `live` on is outstanding and goes first; what an outage left
behind is in `spans`, oldest first, and follows. Whatever is in neither was confirmed, or given up and accounted for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class Span:
    """Positions [first, past). A replay may be for one `node` only, and for readings dated from `since_ms` on."""

    first: int
    past: int
    node: str = ""
    since_ms: int = 0
    until_ms: int = 0

    @property
    def whole(self) -> bool:
        """Every reading in it is meant."""
        return not (self.node or self.since_ms or self.until_ms)


WHOLE = Span(0, 0)
"""The kind of whatever is no replay."""


@dataclass(frozen=True, slots=True)
class Flight:
    """Positions [first, past) on their way, not confirmed yet; `span` is the piece of history that they belong to."""

    first: int
    past: int
    span: Span | None = None


@dataclass(slots=True)
class Progress:
    """One route in one lane."""

    live: int
    spans: list[Span] = field(default_factory=list)
    flying: list[Flight] = field(default_factory=list)

    # What goes next.

    def next_live(self) -> int:
        """The first position of the live end that is not on its way."""
        # What is behind the last flight may have been skipped meanwhile.
        return max([self.live, *(flight.past for flight in self.flying if flight.span is None)])

    def next_history(self) -> tuple[int, Span] | None:
        """The first position of the history that is not on its way, and its span."""
        for span in self.spans:
            position = span.first
            for flight in sorted(self.flying, key=lambda flight: flight.first):
                # The live end, too, may be on its way and lie in a span by now: something after it was skipped.
                if flight.first <= position < flight.past and _same(flight.span or WHOLE, span):
                    position = flight.past
            if position < span.past:
                return position, span
        return None

    def fly(self, first: int, past: int, span: Span | None) -> Flight:
        """[first, past) is on its way now."""
        flight = Flight(first, past, span)
        self.flying.append(flight)
        return flight

    # What has become of it.

    def confirm(self, flight: Flight) -> None:
        """The far side has it; flights of the live end are confirmed in the order in which they left."""
        if flight in self.flying:
            self.flying.remove(flight)
        wanted = flight.span
        if wanted is None or wanted.whole:
            if self.live < flight.first < flight.past:
                self.spans.append(Span(self.live, flight.first))
                self.live = flight.past
            elif flight.first <= self.live:
                self.live = max(self.live, flight.past)
            wanted = WHOLE
        self.spans = [
            piece
            for span in self.spans
            for piece in (_without(span, flight.first, flight.past) if _same(span, wanted) else (span,))
        ]

    def let_go(self) -> None:
        """What was on its way is lost with the link, and outstanding as before."""
        self.flying.clear()

    def skip(self, first: int, past: int) -> None:
        """[first, past) will never be sent: given up, damaged, or not wanted."""
        self.spans = [piece for span in self.spans for piece in _without(span, first, past)]
        if first <= self.live < past:
            self.live = past
        elif self.live < first < past:
            self.spans.append(Span(self.live, first))
            self.live = past

    def set_back(self, head: int) -> None:
        """The live end begins anew at `head`; what it had before it becomes history."""
        if head <= self.live:
            return
        if self.spans and self.spans[-1].whole and self.spans[-1].past == self.live:
            self.spans[-1] = replace(self.spans[-1], past=head)
        else:
            self.spans.append(Span(self.live, head))
        self.live = head

    def replay(self, wanted: Span) -> list[Span]:
        """Send `wanted` again, save what is outstanding anyway; returns the spans that this adds."""
        pieces = [wanted] if wanted.past <= self.live else [replace(wanted, past=max(wanted.first, self.live))]
        for span in self.spans:
            if span.whole or _same(span, wanted):
                pieces = [rest for piece in pieces for rest in _without(piece, span.first, span.past)]
        pieces = [piece for piece in pieces if piece.first < piece.past]
        self.spans += pieces
        return pieces

    # How it is.

    def outstanding(self, since: int = 0) -> int:
        """The first position from `since` on that is not confirmed; replays do not count, they were once."""
        spans = [max(span.first, since) for span in self.spans if span.whole and span.past > since]
        return min([max(self.live, since), *spans])

    def oldest(self) -> int:
        """The first position that will still be read."""
        return min([self.live, *(span.first for span in self.spans)])

    def pieces(self, head: int) -> Iterator[tuple[int, int]]:
        """Everything outstanding, replays included."""
        for span in self.spans:
            yield span.first, span.past
        if self.live < head:
            yield self.live, head

    def touches(self, first: int, past: int) -> bool:
        """Whether something in [first, past) is outstanding."""
        return self.live < past or any(span.first < past and span.past > first for span in self.spans)

    def lacks(self, first: int, past: int) -> bool:
        """Whether something in [first, past) was never confirmed: replays do not count, they were once."""
        return self.live < past or any(span.whole and span.first < past and span.past > first for span in self.spans)

    def is_inside(self, first: int, past: int) -> bool:
        """Whether [first, past) is partly sent: an edge of something outstanding, or a flight, lies within it."""
        edges = [self.live, *(edge for span in self.spans for edge in (span.first, span.past))]
        return any(first < edge < past for edge in edges) or any(
            flight.first < past and flight.past > first for flight in self.flying
        )

    def backlog(self, head: int) -> tuple[int, int]:
        """(positions of the live end, positions of history)."""
        return max(0, head - self.live), sum(span.past - span.first for span in self.spans)

    def saved(self, committed: int) -> tuple[int, list[Span]]:
        """What may be saved: never ahead of what is on the card, for positions are given again after a crash."""
        spans = [replace(span, past=min(span.past, committed)) for span in self.spans if span.first < committed]
        return min(self.live, committed), spans


def _same(one: Span, other: Span) -> bool:
    """Whether both are of the same kind: the whole history, or the same replay."""
    return (one.node, one.since_ms, one.until_ms) == (other.node, other.since_ms, other.until_ms)


def _without(span: Span, first: int, past: int) -> Iterator[Span]:
    """What is left of a span when [first, past) is taken out."""
    if past <= span.first or first >= span.past:
        yield span
        return
    if span.first < first:
        yield replace(span, past=first)
    if past < span.past:
        yield replace(span, first=past)
