"""The node. A reading's way here: sensor -> row -> outbox -> link -> gateway, and `ack` comes back.

MicroPython runs this after boot.py; on a computer it is run with the node's folder:

    micropython main.py FOLDER
"""

import random
import sys

if sys.implementation.name != "micropython":
    import host

    host.install()

import power
import publish
import settings as node_settings
import wire
from clock import Clock, Identity, ticks_diff, ticks_ms
from outbox import Outbox
from sample import Sampler

try:
    from time import sleep_ms
except ImportError:  # CPython
    from time import sleep

    def sleep_ms(ms):
        sleep(ms / 1000)


SLICE_MS = 50


class Node:
    """A node: samples from the start, whatever the network does, and sends when there is a gateway that takes it."""

    def __init__(self, settings, folder, say=print):
        self._settings = settings
        self._say = say
        self._stopping = False
        self._clock = Clock()
        self.identity = Identity(folder, settings.install)
        self.identity.anchor_ms = None
        self._sampler = Sampler(settings.sensors, settings.period_ms)
        self.outbox = Outbox(
            folder + "/outbox",
            self.identity.boot,
            wire.manifest(self._sampler.channels(), settings.period_ms),
            settings.outbox_rows,
            settings.outbox_bytes,
            settings.spill_after_s * 1000,
        )
        self.connections = 0
        self._wait_ms = settings.first_wait_ms
        self._reset_cause = power.reset_cause()

    def run(self):
        """Sample and send until stop() is called."""
        self._say("node %s install %s boot %d" % (self._settings.node, self.identity.install, self.identity.boot))
        turn = 0
        while not self._stopping:
            gateway = self._settings.gateways[turn % len(self._settings.gateways)]
            turn += 1
            self._serve(gateway)
            self._pause()
        self.outbox.spill()

    def stop(self):
        """Say goodbye and end run(), soon."""
        self._stopping = True

    def _serve(self, gateway):
        """One connection, until it fails. Whatever fails is only told: the rows are in the outbox."""
        self.connections += 1
        session = publish.Session(
            self._settings,
            gateway,
            self.identity,
            self.connections,
            self.outbox,
            self._clock,
            self._about,
            self._progress,
            self._say,
        )
        try:
            session.run(lambda: self._stopping)
        except Exception as error:  # umqtt raises whatever a broken packet led to, not only OSError
            self._say("connection %d: %s %s" % (self.connections, type(error).__name__, error))
        if session.acks:
            self._wait_ms = self._settings.first_wait_ms

    def _pause(self):
        """Wait before the next connection, longer each time, with jitter so that boards do not come all at once."""
        wait_ms = int(self._wait_ms * random.uniform(0.5, 1.0))
        self._wait_ms = min(self._wait_ms * 2, self._settings.longest_wait_ms)
        began = ticks_ms()
        while not self._stopping and ticks_diff(ticks_ms(), began) < wait_ms:
            due_ms = self._progress()
            self.outbox.tend(self._clock.uptime_ms())
            sleep_ms(min(SLICE_MS, due_ms))

    def _progress(self):
        """What never waits for the network: the next row, when it is due. Returns the ms until then, at least 1."""
        now = self._clock.uptime_ms()
        if self._sampler.due_in(now) <= 0:
            self.outbox.put(now, self._sampler.row(now))
        return max(1, self._sampler.due_in(now))

    def _about(self):
        return {
            "fw": self._settings.firmware,
            "rc": self._reset_cause,
            "g": self._settings.groups,
            "ms": self._sampler.missed,
        }


def main(folder):
    """Run the node whose files are in `folder`; Ctrl-C ends it, with what it holds on flash."""
    node = Node(node_settings.load(folder), folder)
    try:
        node.run()
    except KeyboardInterrupt:
        node.outbox.spill()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
