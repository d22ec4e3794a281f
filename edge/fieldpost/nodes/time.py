"""Dates for readings of nodes that have no clock: plain arithmetic over times that are handed in.

A node sends its uptime, never a date. A message is received at `uptime + offset + delay`, and a delay only ever
adds; so the smallest `received - uptime` of the last hour is the best known offset, and following it follows a
crystal that drifts (device/PROTOCOL.md, "Time on a node without a clock"). All times are milliseconds; `boottime`
is the gateway's CLOCK_BOOTTIME, which no clock setting moves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..reading import Quality
from ..wire import Anchor

WINDOW_MS = 3_600_000
DRIFT_PPM = 100
"""What a node's crystal may be off, its temperature included."""

FEW_MESSAGES = 10
"""Until so many messages were heard, the smallest delay may still be a large one."""

DELAY_FEW_MS = 1000
DELAY_MS = 50
"""Delays that the smallest one may hide: before and after FEW_MESSAGES. An estimate, one way can't be measured."""

EARLIEST_UNKNOWN = -1
KEPT_BOOTS = 4


@dataclass(slots=True)
class BootClock:
    """One boot's offset between its uptime and CLOCK_BOOTTIME: a sliding minimum."""

    heard: int = 0
    _minima: deque[tuple[int, int]] = field(default_factory=deque)

    def hear(self, uptime_ms: int, received_ms: int) -> None:
        """A message that was sent at `uptime_ms` came at `received_ms` (CLOCK_BOOTTIME)."""
        self.heard += 1
        offset = received_ms - uptime_ms
        while self._minima and self._minima[-1][1] >= offset:
            self._minima.pop()
        self._minima.append((received_ms, offset))
        while self._minima[0][0] < received_ms - WINDOW_MS or len(self._minima) > 256:
            self._minima.popleft()

    @property
    def offset_ms(self) -> int:
        """CLOCK_BOOTTIME at uptime 0."""
        return self._minima[0][1]

    def date(self, uptimes_ms: Sequence[int], now_ms: int, step_ms: int) -> list[tuple[int, int]]:
        """(date, how far off it may be: delay, and drift since the offset was heard) at `now_ms`; `step_ms` is what
        the wall clock is ahead of CLOCK_BOOTTIME.
        """
        delay = DELAY_MS if self.heard >= FEW_MESSAGES else DELAY_FEW_MS
        heard_ms, offset_ms = self._minima[0]
        since_heard, heard_at = abs(now_ms - heard_ms), heard_ms - offset_ms
        begin_ms = step_ms + offset_ms
        return [
            (begin_ms + at, delay + max(since_heard, abs(heard_at - at)) * DRIFT_PPM // 1_000_000) for at in uptimes_ms
        ]


@dataclass(slots=True)
class _Node:
    boots: dict[tuple[str, int], BootClock] = field(default_factory=dict)
    last_ms: dict[tuple[str, int], int] = field(default_factory=dict)


class Dating:
    """What the gateway knows of its nodes' clocks."""

    def __init__(self) -> None:
        self._nodes: dict[str, _Node] = {}

    def hear(self, node: str, install: str, boot: int, uptime_ms: int, received_ms: int) -> None:
        """A live message of a boot; retained and repeated ones must not be told."""
        boots = self._nodes.setdefault(node, _Node()).boots
        boots.setdefault((install, boot), BootClock()).hear(uptime_ms, received_ms)
        while len(boots) > KEPT_BOOTS:
            del boots[next(iter(boots))]

    def date(
        self,
        node: str,
        install: str,
        boot: int,
        uptimes_ms: Sequence[int],
        anchor: Anchor | None,
        boottime_ms: int,
        unix_ms: int,
    ) -> tuple[list[tuple[int, int]], Quality]:
        """(unix ms, error ms) for rows measured at `uptimes_ms` of a boot; it is now `boottime_ms` = `unix_ms`.
        And what these dates rest on: `SYNCED` stands for the gateway's own clock, whatever that is worth.

        By the offset where the gateway hears or heard this boot, else by its `anchor`, else as the interval
        between the boots before and after it.
        """
        known = self._nodes.setdefault(node, _Node())
        clock = known.boots.get((install, boot))
        step = unix_ms - boottime_ms
        if clock is not None:
            dated = clock.date(uptimes_ms, boottime_ms, step)
        elif anchor is not None:
            dated = [
                (
                    anchor.unix_ms + uptime - anchor.uptime_ms,
                    anchor.precision_ms + abs(uptime - anchor.uptime_ms) * DRIFT_PPM // 1_000_000,
                )
                for uptime in uptimes_ms
            ]
        else:
            return [self._between(known, install, boot, step, unix_ms)] * len(uptimes_ms), Quality.BOUNDED
        if dated:
            known.last_ms[(install, boot)] = dated[-1][0]
            while len(known.last_ms) > KEPT_BOOTS:
                del known.last_ms[next(iter(known.last_ms))]
        return dated, Quality.SYNCED if clock is not None else Quality.ANCHORED

    def _between(self, known: _Node, install: str, boot: int, step: int, unix_ms: int) -> tuple[int, int]:
        """The interval in which a boot lies that never heard the time, as its middle and half its width."""
        later = [clock.offset_ms + step for (i, b), clock in known.boots.items() if i == install and b > boot]
        earlier = [last for (i, b), last in known.last_ms.items() if i == install and b < boot]
        until = min(later, default=unix_ms)
        if not earlier or max(earlier) > until:
            return until, EARLIEST_UNKNOWN
        since = max(earlier)
        return (since + until) // 2, (until - since + 1) // 2
