"""Topics and payloads as PROTOCOL.md has them: plain functions, no I/O."""

import hashlib
import json

ROOT = b"fp1/"
GATEWAY_STATE = b"fp1/gateway/state"
GATEWAY_TIME = b"fp1/gateway/time"


def topic(node, leaf):
    """`fp1/<node>/<leaf>` as bytes: umqtt counts letters where it must count bytes."""
    return ROOT + node.encode() + b"/" + leaf.encode()


def dumps(value):
    """JSON without blanks, as bytes."""
    try:
        return json.dumps(value, separators=(",", ":")).encode()
    except TypeError:  # an old MicroPython
        return json.dumps(value).encode()


def manifest(channels, period_ms):
    """(payload, hash) of what the columns mean."""
    payload = dumps({"ch": channels, "p": period_ms, "sl": False, "cap": []})
    digest = hashlib.sha256(payload).digest()
    return payload, "".join("%02x" % byte for byte in digest[:4])


def will(install, boot, connection):
    """What the broker says of us when the connection dies."""
    return dumps({"st": "lost", "i": install, "b": boot, "c": connection})


def data(install, message, uptime_ms, manifest_hash):
    """Rows of one boot. `message` is the outbox's; of the current boot the ages count back from `uptime_ms`."""
    if message.current:
        anchor = None
    else:
        anchor = message.anchor or 0
        uptime_ms = message.rows[-1][1] if message.rows else 0
    rows = [[uptime_ms - row[1]] + row[2] for row in message.rows]
    return dumps(
        [
            1,
            install,
            message.boot,
            message.first,
            uptime_ms,
            anchor,
            message.held,
            message.drops,
            message.manifest or manifest_hash,
            rows,
        ]
    )


def parse_ack(payload):
    """(install, boot, seq), or None where it is no ack."""
    try:
        install, boot, seq = json.loads(payload)
    except (ValueError, TypeError):
        return None
    if isinstance(install, str) and isinstance(boot, int) and isinstance(seq, int):
        return install, boot, seq
    return None


def parse_gateway_state(payload):
    """(`up`, `full` or `lost`, within how many seconds an ack is to be expected: 0 where it does not say).

    Anything else counts as lost.
    """
    try:
        told = json.loads(payload)
        st, within_s = told["st"], told.get("w", 0)
    except (ValueError, TypeError, KeyError, AttributeError):
        return "lost", 0
    if st not in ("up", "full"):
        return "lost", 0
    return st, within_s if isinstance(within_s, int) and 0 <= within_s <= 3600 else 0


def parse_time(payload):
    """(unix ms, precision ms), or None where the gateway does not know it or it is no time."""
    try:
        unix_ms, precision_ms, synchronised = json.loads(payload)
    except (ValueError, TypeError):
        return None
    if isinstance(unix_ms, int) and isinstance(precision_ms, int) and unix_ms > 1600000000000:
        # A gateway without NTP is still the only clock that this node has; the gateway corrects what it dates.
        return unix_ms, precision_ms if synchronised is True else max(precision_ms, 1000)
    return None
