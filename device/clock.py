"""A node's own time: milliseconds since boot, the boot counter, and the moment at which it last knew the time."""

import json
import os
import time

from settings import is_install

if hasattr(time, "ticks_ms"):
    ticks_ms, ticks_diff = time.ticks_ms, time.ticks_diff
else:  # CPython

    def ticks_ms():
        return time.monotonic_ns() // 1000000

    def ticks_diff(a, b):
        return a - b


class Clock:
    """Uptime that does not wrap. Ask it at least every 6 days: ticks_ms wraps after 12.4."""

    def __init__(self):
        self._ticks = ticks_ms()
        self._uptime_ms = 0

    def uptime_ms(self):
        """Milliseconds since this clock was made."""
        now = ticks_ms()
        self._uptime_ms += ticks_diff(now, self._ticks)
        self._ticks = now
        return self._uptime_ms


class Identity:
    """(install, boot) of this run: `boot` is on flash, raised by one, before the first sample."""

    def __init__(self, folder, given_install):
        self._path = folder + "/boot.json"
        install, boot = self._read()
        if given_install is not None and install != given_install:
            install, boot = given_install, 0  # flashed anew
        if install is None:  # the counter is unreadable: a used number must not come again, so another install
            install, boot = new_install(), 0
        self.install = install
        self.boot = boot + 1
        write_whole(self._path, json.dumps([self.install, self.boot]))

    def _read(self):
        try:
            with open(self._path) as file:
                install, boot = json.load(file)
            if is_install(install) and isinstance(boot, int) and boot >= 0:
                return install, boot
        except (OSError, ValueError, TypeError):
            pass
        return None, 0


def new_install():
    """12 hex digits by chance."""
    return "".join("%02x" % byte for byte in os.urandom(6))


def write_whole(path, text):
    """Put a file in place whole: after a power cut there is the old one or the new one."""
    with open(path + ".new", "w") as file:
        file.write(text)
    os.rename(path + ".new", path)
