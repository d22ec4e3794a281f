"""Whether the gateway's own clock can be trusted: the kernel's word."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

TIME_ERROR = 5
"""adjtimex(2): the clock is not synchronised."""


@functools.cache
def _adjtimex() -> Callable[[object], int]:
    return ctypes.CDLL(None, use_errno=True).adjtimex


def synchronised() -> bool:
    """Whether something (chrony, timesyncd, ntpd) keeps the kernel's clock in step, by adjtimex(2)."""
    # struct timex is 208 bytes at most; `modes` = 0, its first field, only reads.
    return 0 <= _adjtimex()(ctypes.create_string_buffer(512)) < TIME_ERROR
