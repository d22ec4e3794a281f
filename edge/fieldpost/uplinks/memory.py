"""An uplink without a far side: what is delivered lies in a list, and every fault is a switch.

uplink = MemoryUplink()
await uplink.open()
uplink.silent = True                # confirmations are held from here on
waiting = asyncio.create_task(uplink.deliver(message))
uplink.release()                    # confirm what is held
assert uplink.delivered == [message]
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import Rejected, Unreachable
from .base import Message, UplinkStatus


@dataclass(frozen=True, slots=True)
class MemorySettings:
    """`timeout_s`: how long a held confirmation is waited for, in seconds. `durable`: what it says of itself."""

    timeout_s: float = 15.0
    durable: bool = False


class MemoryUplink:
    """Takes messages into `delivered`, in the order of the calls.

    `unreachable`, when it isn't empty, is why nothing can be delivered; setting it loses the link. `reject`
    gives the reason why a message is refused for good, or None. While `silent`, messages are taken but not
    confirmed: `release` confirms them, `timeout_s` and `close` give them up.
    """

    def __init__(self, settings: MemorySettings | None = None) -> None:
        self.settings = settings or MemorySettings()
        self.delivered: list[Message] = []
        self.reject: Callable[[Message], str | None] = lambda message: None
        self.silent = False
        self.opened = 0
        self._unreachable = ""
        self._state = "down"
        self._held: list[asyncio.Future[None]] = []
        self._messages = 0
        self._bytes = 0

    @property
    def unreachable(self) -> str:
        """Why nothing can be delivered; empty when all is well."""
        return self._unreachable

    @unreachable.setter
    def unreachable(self, reason: str) -> None:
        self._unreachable = reason
        if reason:
            self._lose(reason)

    async def open(self) -> None:
        """Be ready, unless `unreachable`."""
        if self._unreachable:
            raise Unreachable(self._unreachable)
        self.opened += 1
        self._state = "up"

    async def deliver(self, message: Message) -> None:
        """Take `message`; return at once, or when it is released."""
        if self._state != "up":
            raise Unreachable(self._unreachable or "not open")
        if reason := self.reject(message):
            raise Rejected(reason)
        self.delivered.append(message)
        if self.silent:
            await self._confirmation()
        self._messages += 1
        self._bytes += len(message.body)

    def release(self) -> None:
        """Confirm what is held, and hold nothing from here on."""
        self.silent = False
        for waiter in self._take_held():
            waiter.set_result(None)

    async def close(self) -> None:
        """Give up what is held."""
        self._lose("closed")

    def status(self) -> UplinkStatus:
        """How it is."""
        return UplinkStatus(self._state, self._unreachable, self._messages, self._bytes, self.settings.durable)

    async def _confirmation(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._held.append(waiter)
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                await waiter
        except TimeoutError:
            reason = f"no confirmation within {self.settings.timeout_s:g} s"
            self._lose(reason)
            raise Unreachable(reason) from None

    def _lose(self, reason: str) -> None:
        self._state = "down"
        for waiter in self._take_held():
            waiter.set_exception(Unreachable(reason))

    def _take_held(self) -> list[asyncio.Future[None]]:
        held, self._held = self._held, []
        return [waiter for waiter in held if not waiter.done()]
