"""A session with a gateway: one connection, from connect to the error that ends it.

The order is the protocol's (PROTOCOL.md): will, connect, subscribe, state, manifest, then rows, oldest first, at most
WINDOW messages ahead of `ack`. Callbacks only put down what came; nothing publishes inside one.
"""

import umqtt.simple
import wire
from link import PUBLISH, Sockets, Way

WINDOW = 8
LAST_PACKET_ID = 60000
"""umqtt never wraps its packet ids; one above 65535 ends the connection."""

REWIND_EVERY_MS = 2000
"""An ack that frees nothing says that a message is missing at the gateway; so often it is believed."""

umqtt.simple.socket = Sockets


class Session:
    """One connection. `progress()` is called while it waits: it goes on sampling, and returns the
    milliseconds until the next row is due. `say(text)` tells a person."""

    def __init__(self, settings, gateway, identity, connection, outbox, clock, about, progress, say):
        self._settings = settings
        self._identity = identity
        self._connection = connection
        self._outbox = outbox
        self._clock = clock
        self._about = about
        self._progress = progress
        self._say = say
        self._way = Way(gateway[0], gateway[1], settings.timeout_s * 1000, progress)
        self._came = []
        self._gateway_state = "lost"
        self._sent = (-1, -1)
        self._window = []
        self._published = []
        self._missing = False
        self._rewound_ms = 0
        self._ack_wait_s = settings.ack_wait_s
        self._rewind_wait_ms = settings.ack_wait_s * 1000
        self._waiting_since_ms = 0
        self._pinged_ms = 0
        self.acks = 0
        self._mqtt = None

    def run(self, stopped):
        """Serve until `stopped()` is true (then say goodbye) or the connection fails (then raise)."""
        try:
            self._open()
            while not stopped():
                due_ms = self._progress()
                self._receive()
                self._send()
                self._keep_alive()
                self._way.link.wait(due_ms)
            self._say_goodbye()
        except KeyboardInterrupt:
            self._say_goodbye()
            raise
        finally:
            self.close()

    def close(self):
        """Close the socket, whatever state it is in: after an error it is never used again."""
        if self._way.link is not None:
            self._way.link.close()

    # Opening.

    def _open(self):
        settings, identity = self._settings, self._identity
        node = settings.node.encode()
        # The will shall be out within 1.5 keepalives; mosquitto waits as long, but looks only every 5 s.
        keepalive_s = max(3, settings.keepalive_s - 4)
        self._mqtt = umqtt.simple.MQTTClient(node, self._way, self._way.port, node, settings.key.encode(), keepalive_s)
        self._mqtt.set_callback(self._put_down)
        will = wire.will(identity.install, identity.boot, self._connection)
        self._mqtt.set_last_will(wire.topic(settings.node, "state"), will, True, 1)
        self._mqtt.connect()
        for topic in (wire.topic(settings.node, "ack"), wire.GATEWAY_STATE, wire.GATEWAY_TIME):
            self._mqtt.subscribe(topic, 1)
        self._publish("state", self.state("up"), True)
        self._publish_manifest(self._outbox.manifest_hash)
        self._pinged_ms = self._clock.uptime_ms()

    def state(self, st):
        """What the node says of itself."""
        identity = self._identity
        told = {
            "st": st,
            "i": identity.install,
            "b": identity.boot,
            "c": self._connection,
            "s": self._outbox.last_seq(),
            "u": self._clock.uptime_ms(),
            "m": self._outbox.manifest_hash,
            "q": len(self._outbox),
            "fs": self._outbox.free_bytes(),
        }
        told.update(self._about())
        return wire.dumps(told)

    def _say_goodbye(self):
        self._publish("state", self.state("bye"), True)
        self._mqtt.disconnect()

    # What comes.

    def _put_down(self, topic, payload):
        self._came.append((bytes(topic), bytes(payload)))

    def _receive(self):
        """Take what has come, without waiting."""
        while True:
            kind = self._mqtt.check_msg()
            if kind is None and not self._came:
                return
            if kind is not None and kind & 0xF0 != PUBLISH:
                raise OSError("unexpected packet 0x%02x" % kind)
            self._handle_all()
            if kind is None:
                return

    def _handle_all(self):
        while self._came:
            topic, payload = self._came.pop(0)
            if topic == wire.GATEWAY_STATE:
                self._take_gateway_state(*wire.parse_gateway_state(payload))
            elif topic == wire.GATEWAY_TIME:
                self._take_time(wire.parse_time(payload))
            elif topic == wire.topic(self._settings.node, "ack"):
                self._take_ack(wire.parse_ack(payload))

    def _take_gateway_state(self, st, ack_within_s):
        self._ack_wait_s = max(self._settings.ack_wait_s, ack_within_s)
        self._rewind_wait_ms = max(self._rewind_wait_ms, self._ack_wait_s * 1000)
        if st == "up" and self._gateway_state != "up":
            self._rewind()
        if st != self._gateway_state:
            self._say("gateway: %s" % st)
        self._gateway_state = st

    def _take_time(self, told):
        if told is not None:
            self._about_time(self._clock.uptime_ms(), told[0], told[1])

    def _about_time(self, uptime_ms, unix_ms, precision_ms):
        """Put it down once a boot and once a day: it costs a write."""
        last = self._identity.anchor_ms
        if last is None or uptime_ms - last > 86400000:
            self._identity.anchor_ms = uptime_ms
            self._outbox.know_time(uptime_ms, unix_ms, precision_ms)

    def _take_ack(self, ack):
        """Free what is durable. An ack of another install, or ahead of what was sent, is not for us."""
        if ack is None or ack[0] != self._identity.install:
            return
        to = (ack[1], ack[2])
        if to > self._outbox.newest_sent and to[0] >= self._identity.boot:
            return
        self._outbox.acked(to[0], to[1])
        self.acks += 1
        if self._settings.verbose:
            self._say("ack %d %d" % to)
        waiting = len(self._window)
        self._window = [last for last in self._window if last > to]
        if waiting and len(self._window) == waiting and to < self._window[0]:
            self._missing = True  # the gateway says again how far it is, though more is on its way
            return
        self._missing = False
        self._sent = max(self._sent, to)
        self._rewind_wait_ms = self._ack_wait_s * 1000
        self._waiting_since_ms = self._clock.uptime_ms()

    # What goes.

    def _send(self):
        """The next rows, if the gateway takes any and the window has room; all again, if it stays silent for long."""
        if self._gateway_state != "up":
            return
        now = self._clock.uptime_ms()
        if self._missing and now - self._rewound_ms >= REWIND_EVERY_MS:
            self._rewind()
        if self._window and now - self._waiting_since_ms > self._rewind_wait_ms:
            self._say("no ack within %d s: sending again" % (self._rewind_wait_ms // 1000))
            self._rewind()
            self._rewind_wait_ms = min(self._rewind_wait_ms * 2, self._settings.longest_ack_wait_s * 1000)
        if len(self._window) >= WINDOW:
            return
        message = self._outbox.next(self._sent, self._settings.rows_per_message)
        if message is None:
            return
        if not self._window:
            self._waiting_since_ms = now
        self._publish_manifest(message.manifest)
        self._sent = message.last()
        self._outbox.newest_sent = max(self._outbox.newest_sent, self._sent)
        self._window.append(self._sent)
        uptime_ms = self._clock.uptime_ms()
        self._publish("data", wire.data(self._identity.install, message, uptime_ms, message.manifest), False)

    def _rewind(self):
        """Start again at the oldest row that is held."""
        self._sent = (-1, -1)
        self._window = []
        self._missing = False
        self._rewound_ms = self._clock.uptime_ms()

    def _publish_manifest(self, hash_):
        """Before rows that name it, once a connection; the retained one is that of this boot."""
        if hash_ in self._published:
            return
        payload = self._outbox.manifest_payload(hash_)
        if payload is not None:
            self._publish("manifest", payload, hash_ == self._outbox.manifest_hash)
        self._published.append(hash_)

    def _publish(self, leaf, payload, retain):
        """At QoS 1; returns with the broker's PUBACK, which says only that the broker has it in memory."""
        if self._mqtt.pid >= LAST_PACKET_ID:
            self._mqtt.pid = 0
        self._mqtt.publish(wire.topic(self._settings.node, leaf), payload, retain, 1)

    def _keep_alive(self):
        """Ping at a third of the keepalive; give up before the broker does."""
        now = self._clock.uptime_ms()
        keepalive_ms = self._settings.keepalive_s * 1000
        if now - self._pinged_ms >= keepalive_ms // 3:
            self._pinged_ms = now
            self._mqtt.ping()
        if self._way.link.silent_ms() > keepalive_ms * 3 // 4:
            raise OSError("nothing heard for %d s" % (self._way.link.silent_ms() // 1000))
