"""The card: the spool's file in the one thread that may touch it, and how much is on it."""

from __future__ import annotations

import asyncio
import ctypes
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

from ..errors import SpoolFault
from .log import Log
from .rows import Commit

P = ParamSpec("P")
T = TypeVar("T")

SHRINK_EVERY_S = 5.0
"""How often pages that became free are given back to the file system."""

VOLATILE = {0x01021994: "tmpfs", 0x858458F6: "ramfs", 0x794C7630: "overlay"}
"""statfs(2): what is gone with the power, whatever fsync says."""


class Card:
    """`bytes` in use of the file and `free` ones of the disk, as of the last commit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = Log(folder)
        self.bytes = 0
        self.free = 0
        self._shrunk_at = time.monotonic()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spool")

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call something in the spool's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(call, *args, **kwargs))

    def write(self, commit: Commit) -> None:
        """Make a commit. Raises SpoolFault: it was not made."""
        self.log.commit(commit)
        if time.monotonic() - self._shrunk_at >= SHRINK_EVERY_S:
            self._shrunk_at = time.monotonic()
            self.log.shrink()
        self.measure()

    def measure(self) -> None:
        """Look how much there is."""
        try:
            self.bytes = self.log.used_bytes()
            disk = os.statvfs(self.folder)
            self.free = disk.f_bavail * disk.f_frsize
        except OSError as error:
            raise SpoolFault(str(error)) from error

    async def close(self) -> None:
        """Let go of the file, and end the thread."""
        await self.run(self.log.close)
        self._thread.shutdown()


def volatile_kind(folder: Path) -> str:
    """`tmpfs`, `ramfs` or `overlay` where the folder is on one, else nothing (statfs(2))."""
    buffer = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statfs(os.fsencode(folder), buffer) != 0:
        return ""
    return VOLATILE.get(ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF, "")
