"""The link: what `umqtt.simple` takes for its socket, and what makes it safe to use.

umqtt reads its module's global `socket`; `umqtt.simple.socket = link.Sockets` puts this in its place, and umqtt itself
stays as it is. A link gives deadlines that no setblocking() erases, one write a packet, whole packets only, a cap on
their size, and the time of the last packet. While it waits it calls `idle()`, which goes on sampling.
"""

import select
import socket

from clock import ticks_diff, ticks_ms

SLICE_MS = 50
"""No wait is longer before idle() is called again."""

MAX_PACKET_BYTES = 2048
"""What a node is sent is small; umqtt would allocate whatever length a packet claims."""

READY = select.POLLIN
WRITABLE = select.POLLOUT
BROKEN = select.POLLERR | select.POLLHUP

CONNACK, PUBLISH, PUBACK, SUBACK, UNSUBACK, PINGRESP = 0x20, 0x30, 0x40, 0x90, 0xB0, 0xD0
BODY_BYTES = {CONNACK: 2, PUBACK: 2, UNSUBACK: 2, PINGRESP: 0}
"""MQTT 3.1.1 gives these packets one length each."""


class Closed(OSError):
    """The other side has closed the connection."""


class Late(OSError):
    """The other side did not answer in time."""


class Way:
    """Where to connect to and how to wait; handed to umqtt as its `server`, so that each node has its own."""

    def __init__(self, host, port, timeout_ms, idle):
        self.host = host
        self.port = port
        self.timeout_ms = timeout_ms
        self.idle = idle
        self.link = None

    def __len__(self):
        """umqtt wants to know whether it has a server at all."""
        return len(self.host)


class Sockets:
    """Stands in for the module `socket` inside umqtt.simple."""

    @staticmethod
    def socket(*unused):
        return Link()

    @staticmethod
    def getaddrinfo(way, port, *unused):
        """The real look-up happens in connect: here there is only the way to it."""
        return [(0, 0, 0, "", way)]


class Link:
    """One connection, over a real socket that never blocks."""

    def __init__(self):
        self._sock = None
        self._way = None
        self._poll = None
        self._waits = True
        self._out = bytearray()
        self._in = b""
        self.last_rx_ms = ticks_ms()
        self.bytes_in = self.bytes_out = 0

    # What umqtt calls.

    def settimeout(self, timeout_s):
        """umqtt's idea of a deadline is erased by its next setblocking: the way's own counts."""

    def setblocking(self, waits):
        self._waits = waits

    def connect(self, way):
        """Connect within the way's deadline. Raises OSError."""
        self._way = way
        way.link = self
        address = socket.getaddrinfo(way.host, way.port, 0, socket.SOCK_STREAM)[0][-1]
        self._sock = socket.socket()
        self._sock.setblocking(False)
        try:
            self._sock.connect(address)
        except OSError as error:
            if error.args[0] not in (115, 119, 36):  # EINPROGRESS: Linux and lwIP, ESP32, BSD
                self.close()
                raise
        self._poll = select.poll()
        self._poll.register(self._sock, READY | WRITABLE)
        self._wait_for(WRITABLE)
        self._poll.modify(self._sock, READY)
        self.last_rx_ms = ticks_ms()

    def write(self, data, size=None):
        """Gather; a packet goes out whole, with the next read or flush."""
        self._out.extend(data if size is None else memoryview(data)[:size])

    def read(self, size):
        """Exactly `size` bytes of the packet that has come. At a packet's first byte it waits for all of it.

        None where setblocking(False) was called and no packet has begun to come. Raises OSError: Late, Closed, or
        what is wrong with the packet.
        """
        self.flush()
        if not self._in:
            if not self._waits and not self._poll_for(READY, 0):
                return None
            self._in = self._packet()
        if size > len(self._in):
            raise OSError("packet ends early")
        data, self._in = self._in[:size], self._in[size:]
        return data

    def close(self):
        """Close; may be called twice. What has gathered (a DISCONNECT) is sent if that needs no waiting."""
        if self._sock is not None:
            try:
                if self._out:
                    self._sock.send(self._out)
                self._sock.close()
            except OSError:
                pass
            self._sock = None

    # What a session calls.

    def flush(self):
        """Send what has gathered. Raises OSError."""
        while self._out:
            try:
                sent = self._checked().send(self._out)
            except OSError as error:
                if error.args[0] != 11:  # EAGAIN
                    raise
                sent = 0
            if sent:
                self.bytes_out += sent
                self._out = self._out[sent:]
            else:
                self._poll.modify(self._sock, READY | WRITABLE)
                self._wait_for(WRITABLE)
                self._poll.modify(self._sock, READY)

    def wait(self, ms):
        """Wait until something has come, `ms` at most and no longer than a slice."""
        self.flush()
        if not self._in:
            self._poll_for(READY, min(ms, SLICE_MS))

    def silent_ms(self):
        """Milliseconds since the last packet came."""
        return ticks_diff(ticks_ms(), self.last_rx_ms)

    # Packets.

    def _packet(self):
        """The next packet, whole: first byte, length, body. Nothing of a half one ever gets to umqtt."""
        head = self._bytes(2)
        kind, length, shift = head[0] & 0xF0, head[1] & 0x7F, 7
        while head[-1] & 0x80:
            if shift > 21:
                raise OSError("malformed length")
            head += self._bytes(1)
            length |= (head[-1] & 0x7F) << shift
            shift += 7
        if length > MAX_PACKET_BYTES:
            raise OSError("packet of %d bytes" % length)
        if kind == PUBLISH:
            if head[0] & 0x06 > 0x02 or length < 2 + (2 if head[0] & 0x06 else 0):
                raise OSError("malformed publish")
        elif kind == SUBACK:
            if length != 3:
                raise OSError("malformed suback")
        elif length != BODY_BYTES.get(kind, -1):
            raise OSError("unexpected packet 0x%02x" % head[0])
        body = self._bytes(length)
        if kind == PUBLISH and (body[0] << 8 | body[1]) + (4 if head[0] & 0x06 else 2) > length:
            raise OSError("malformed topic")
        self.last_rx_ms = ticks_ms()
        return head + body

    def _bytes(self, size):
        data = b""
        while len(data) < size:
            try:
                some = self._checked().recv(size - len(data))
            except OSError as error:
                if error.args[0] != 11:  # EAGAIN
                    raise
                self._wait_for(READY)
                continue
            if not some:
                raise Closed("closed by the broker")
            data += some
        self.bytes_in += size
        return data

    # Waiting.

    def _wait_for(self, event):
        """Wait until the socket is ready for `event`, in slices, within the deadline."""
        began = ticks_ms()
        while not self._poll_for(event, SLICE_MS):
            if ticks_diff(ticks_ms(), began) > self._way.timeout_ms:
                raise Late("no answer within %d ms" % self._way.timeout_ms)
            self._way.idle()

    def _poll_for(self, event, ms):
        for ready in self._poll.poll(ms):
            if ready[1] & event:
                return True
            if ready[1] & BROKEN:
                raise Closed("connection refused or lost")
        return False

    def _checked(self):
        if self._sock is None:
            raise Closed("not open")
        return self._sock
