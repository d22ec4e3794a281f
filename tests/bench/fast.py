"""Fieldpost's command line in a process whose clocks run FACTOR times as fast.

    python tests/bench/fast.py 120 run --config gateway.toml

Everything in it that looks at a clock or waits for one lives a day in twelve minutes; what it talks to does not, so
timeouts towards brokers must be set as much longer. The disk and the processor stay as slow as they are.
"""

from __future__ import annotations

import selectors
import sys
import time
from collections.abc import Callable
from typing import Any


def speed_up(factor: float) -> None:
    """Make every clock of this process that tells the time of day or an age run faster from now on."""
    began = time.monotonic_ns()
    real = time.monotonic_ns

    def ahead() -> int:
        return round((real() - began) * (factor - 1))

    def faster_ns(clock: Callable[..., int]) -> Callable[..., int]:
        return lambda *which: clock(*which) + ahead()

    def faster(clock: Callable[..., float]) -> Callable[..., float]:
        return lambda *which: clock(*which) + ahead() / 1e9

    for name in ("monotonic_ns", "time_ns", "clock_gettime_ns"):
        setattr(time, name, faster_ns(getattr(time, name)))
    for name in ("monotonic", "time", "clock_gettime"):
        setattr(time, name, faster(getattr(time, name)))
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(seconds / factor)
    _divide_timeouts(factor)


def _divide_timeouts(factor: float) -> None:
    """An event loop waits in its selector, by the kernel's clock."""
    kind: Any = selectors.DefaultSelector
    select = kind.select

    def faster(self: Any, timeout: float | None = None) -> Any:
        return select(self, timeout / factor if timeout is not None and timeout > 0 else timeout)

    kind.select = faster


if __name__ == "__main__":
    factor = float(sys.argv.pop(1))
    del sys.path[0]  # this folder's modules are not fieldpost's
    speed_up(factor)
    from fieldpost import clock, mqtt
    from fieldpost.cli import main

    # A moment between two looks at the clocks is `factor` times as long here, and no setting of the clock.
    clock.STEP_MS = round(clock.STEP_MS * factor)
    # The nodes' broker answers as soon as ever, which must be soon enough.
    mqtt.connect.__wrapped__.__kwdefaults__["keepalive_s"] = 3600
    main()
