"""The gateway's own clock: whether it can be trusted, and what becomes of dates when it is set.

A Pi has no battery: it starts with a wrong date and learns the right one minutes later, or never. What is measured
meanwhile is dated all the same, and corrected once the clock is set: CLOCK_BOOTTIME goes on through a setting of the
clock, so the size of the step is known exactly.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

TIME_ERROR = 5
"""adjtimex(2): the clock is not synchronised."""

STEP_MS = 200
"""A change of the wall clock against CLOCK_BOOTTIME that is a step; chrony and timesyncd slew smaller ones."""

KEPT_ERAS = 64


class Clock(Protocol):
    """Where the time comes from; a test holds it in its hand."""

    def boottime_ms(self) -> int:
        """CLOCK_BOOTTIME: no clock setting moves it, and it goes on while the machine sleeps."""

    def unix_ms(self) -> int:
        """CLOCK_REALTIME, which may be wrong and may step."""

    def synchronised(self) -> bool:
        """Whether something keeps CLOCK_REALTIME right."""

    def kernel_boot(self) -> str:
        """The boot of the machine that CLOCK_BOOTTIME counts from."""


class SystemClock:
    """The kernel's clocks."""

    def boottime_ms(self) -> int:
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000

    def unix_ms(self) -> int:
        return time.time_ns() // 1_000_000

    def synchronised(self) -> bool:
        return synchronised()

    def kernel_boot(self) -> str:
        return _kernel_boot()


@functools.cache
def _kernel_boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@functools.cache
def _adjtimex() -> Callable[[object], int]:
    return ctypes.CDLL(None, use_errno=True).adjtimex


def synchronised() -> bool:
    """Whether something (chrony, timesyncd, ntpd) keeps the kernel's clock in step, by adjtimex(2)."""
    # struct timex is 208 bytes at most; `modes` = 0, its first field, only reads.
    return 0 <= _adjtimex()(ctypes.create_string_buffer(512)) < TIME_ERROR


@dataclass(frozen=True, slots=True)
class Era:
    """A stretch in which the wall clock was `step_ms` ahead of CLOCK_BOOTTIME of one boot of the machine."""

    number: int
    kernel_boot: str
    step_ms: int
    synced: bool


class Eras:
    """The eras of the gateway's clock, newest last. A pure state machine."""

    def __init__(self, known: list[Era]) -> None:
        self._known = known[-KEPT_ERAS:]
        self._by_number = {era.number: era for era in self._known}
        self._synced: set[int] = {era.number for era in self._known if era.synced}

    @property
    def now(self) -> Era:
        """The newest; `observe` must have been called once."""
        return self._known[-1]

    @property
    def known(self) -> list[Era]:
        return list(self._known)

    def observe(self, kernel_boot: str, boottime_ms: int, unix_ms: int, synced: bool) -> Era | None:
        """Look at the clocks; returns the era that has begun, or None."""
        step_ms = unix_ms - boottime_ms
        if self._known and self.now.kernel_boot == kernel_boot:
            stepped = abs(step_ms - self.now.step_ms) > STEP_MS
            # A clock that was set once stays good for hours when the line to its source goes.
            if not stepped and (self.now.synced or not synced):
                return None
            synced = synced or (self.now.synced and not stepped)
        era = Era(self.now.number + 1 if self._known else 1, kernel_boot, step_ms, synced)
        self._known.append(era)
        self._by_number[era.number] = era
        if synced:
            self._synced.add(era.number)
        while len(self._known) > KEPT_ERAS:
            gone = self._known.pop(0)
            del self._by_number[gone.number]
            self._synced.discard(gone.number)
        return era

    def is_synced(self, number: int) -> bool:
        """Whether dates of this era are good as they are."""
        return number in self._synced

    def correction_ms(self, number: int) -> int | None:
        """What to add to dates of an era in which the clock was not set; None where that is not known (yet)."""
        era = self._by_number.get(number)
        if era is None:
            return None
        for later in reversed(self._known):
            if later.synced and later.kernel_boot == era.kernel_boot:
                return later.step_ms - era.step_ms
        return None
