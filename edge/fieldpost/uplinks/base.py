"""The contract of an uplink: one far side, whatever it speaks.

One file a kind, each with `open`, `deliver` and `close`; `tests/edge/test_uplinks.py` runs over all of them
against the real far side. Which readings go where, in what form, waits and order are not an uplink's business:
that is `routes` and `forward`.
"""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Message:
    """One message for a far side: a batch of readings in some form.

    `id` is made of the readings' ids, so a repeat of the same batch carries the same id.
    """

    id: str
    body: bytes
    content_type: str
    content_encoding: str
    readings: int


def is_nobody(fault: BaseException | None) -> bool:
    """Whether an error says that nobody was there to answer: refused, no way there, no such name."""
    return isinstance(fault, OSError) and (
        isinstance(fault, ConnectionRefusedError | socket.gaierror)
        or fault.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH)
    )


@dataclass(frozen=True, slots=True)
class UplinkStatus:
    """How an uplink is; `state` is one of `connecting`, `up`, `blocked`, `down`.

    `durable`: what it confirms is kept over a `kill -9` of the far side, so it need not be kept here as well. Probed
    when the link opens; never believed of a far side that can't show it.
    """

    state: str
    detail: str = ""
    messages: int = 0
    bytes: int = 0
    durable: bool = False


class Uplink(Protocol):
    """One far side.

    `deliver` may be called many times at once: messages are sent in the order of the calls, and each call
    returns when its own message is confirmed. After `Unreachable` (from any call) the connection is gone:
    `close`, then `open` again. Every wait inside ends by itself (deadlines of seconds).
    """

    async def open(self) -> None:
        """Connect and make sure that the far side has a place for our messages. Raises Unreachable."""

    async def deliver(self, message: Message) -> None:
        """Return once the far side has confirmed `message`. Raises Unreachable or Rejected."""

    async def close(self) -> None:
        """Close the connection; never raises, may be called twice."""

    def status(self) -> UplinkStatus:
        """How the uplink is now."""
