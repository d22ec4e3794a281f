"""The node protocol's topics and payloads (device/PROTOCOL.md) as typed values: plain functions, no I/O.

All of it comes from the network, so all of it is bounded here: a payload that decodes may be trusted by the rest
of the gateway to be small and well typed, everything else raises `Malformed` with a reason to count by.
"""

from __future__ import annotations

import functools
import hashlib
import re
from typing import Annotated, TypeVar

import msgspec

from .errors import Malformed
from .reading import Channel, Manifest, Value

ROOT = "fp1"
MAX_PAYLOAD_BYTES = 16_384
MAX_ROWS = 256
MAX_CHANNELS = 64
RESERVED = frozenset({"gateway", "group", "file"})

NODE_NAME = re.compile(r"[a-z0-9-]{1,32}\Z")

Install = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{12}\Z")]
Hash = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{8}\Z")]
# 2^53 is the largest integer that every JSON reader keeps exactly; a boot counter never gets near 2^31.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Boot = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
Reason = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9-]{1,16}\Z")]
Cell = Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)] | Reason | None
Row = Annotated[list[Cell], msgspec.Meta(min_length=1, max_length=MAX_CHANNELS + 1)]
Span = tuple[Count, Count]


class Anchor(msgspec.Struct, frozen=True, array_like=True):
    """The time as a boot last knew it: at `uptime_ms` it was `unix_ms`, give or take `precision_ms`."""

    uptime_ms: Count
    unix_ms: Count
    precision_ms: Count


class _Data(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    version: int
    install: Install
    boot: Boot
    first_seq: Count
    uptime_ms: Count
    anchor: Anchor | Count | None
    held: Count
    drops: Annotated[list[Span], msgspec.Meta(max_length=64)]
    manifest: Hash
    rows: Annotated[list[Row], msgspec.Meta(max_length=MAX_ROWS)]


class Data(msgspec.Struct, frozen=True, gc=False):
    """Rows of one boot. `ages_ms` count back from `uptime_ms`; row n has seq `first_seq + n`.

    `current` tells whether the boot is the one that the node is in; else `anchor` is its time as it last knew
    it, or None where it never did. `held` is the oldest seq that the node keeps, `drops` what it gave up.
    """

    install: str
    boot: int
    first_seq: int
    uptime_ms: int
    current: bool
    anchor: Anchor | None
    held: int
    drops: tuple[tuple[int, int], ...]
    manifest: str
    ages_ms: tuple[int, ...]
    rows: tuple[tuple[Value, ...], ...]


class State(msgspec.Struct, frozen=True, rename={"install": "i", "boot": "b", "connection": "c"}):
    """What a node says of itself, or its last will (`st` is then `lost`)."""

    st: Annotated[str, msgspec.Meta(pattern=r"^[a-z]{1,8}\Z")]
    install: Install
    boot: Boot
    connection: Count
    last_seq: Count | None = msgspec.field(default=None, name="s")
    uptime_ms: Count | None = msgspec.field(default=None, name="u")
    firmware: Annotated[str, msgspec.Meta(max_length=32)] = msgspec.field(default="", name="fw")
    queued: Count = msgspec.field(default=0, name="q")


class _Manifest(msgspec.Struct, frozen=True):
    ch: Annotated[list[Channel], msgspec.Meta(min_length=1, max_length=MAX_CHANNELS)]
    p: Annotated[int, msgspec.Meta(ge=1, le=2**40)]


_data = msgspec.json.Decoder(_Data)
_state = msgspec.json.Decoder(State)
_manifest = msgspec.json.Decoder(_Manifest)

_CHANNEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,31}\Z")  # RFC 8428 section 4.5.1, and our length
_UNIT = re.compile(r"[ -~]{0,16}\Z")


@functools.lru_cache(maxsize=4096)
def parse_topic(topic: str) -> tuple[str, str]:
    """`fp1/<node>/<leaf>` -> (node, leaf). Raises Malformed (`topic`)."""
    parts = topic.split("/")
    if len(parts) != 3 or parts[0] != ROOT or parts[1] in RESERVED or not NODE_NAME.match(parts[1]):
        raise Malformed("topic", repr(topic[:80]))
    return parts[1], parts[2]


def parse_data(payload: bytes) -> Data:
    """Rows that a node sends. Raises Malformed (`size`, `encoding`, `json`, `version`, `type`, `range`)."""
    raw = _decode(_data, payload)
    if raw.version != 1:
        raise Malformed("version", str(raw.version))
    if raw.first_seq < raw.held and raw.rows:
        raise Malformed("range", f"first seq {raw.first_seq} is below held {raw.held}")
    for first, last in raw.drops:
        if last < first:
            raise Malformed("range", f"drops from {first} to {last}")
    ages, longest = tuple([row[0] for row in raw.rows]), raw.uptime_ms
    for age in ages:
        if not isinstance(age, int) or not 0 <= age <= longest:
            raise Malformed("range", f"age {age!r} at uptime {raw.uptime_ms}")
    if raw.anchor is not None and not isinstance(raw.anchor, Anchor) and raw.anchor != 0:
        raise Malformed("type", "anchor is neither null, 0 nor a triple")
    return Data(
        install=raw.install,
        boot=raw.boot,
        first_seq=raw.first_seq,
        uptime_ms=raw.uptime_ms,
        current=raw.anchor is None,
        anchor=raw.anchor if isinstance(raw.anchor, Anchor) else None,
        held=raw.held,
        drops=tuple(raw.drops),
        manifest=raw.manifest,
        ages_ms=ages,  # type: ignore[arg-type]  # each was checked to be an int above
        rows=tuple([tuple(row[1:]) for row in raw.rows]),
    )


def parse_manifest(payload: bytes) -> Manifest:
    """What a node's columns mean. Raises Malformed."""
    raw = _decode(_manifest, payload)
    for channel in raw.ch:
        if not _CHANNEL_NAME.match(channel.name) or not _UNIT.match(channel.unit):
            raise Malformed("range", f"channel {channel.name[:40]!r} in {channel.unit[:20]!r}")
        if not 1 <= channel.scale <= 10**9 or len(channel.sensor) > 32 or len(channel.kind) > 16:
            raise Malformed("range", f"channel {channel.name!r}: scale, sensor or kind")
    if len({channel.name for channel in raw.ch}) != len(raw.ch):
        raise Malformed("range", "two channels of the same name")
    return Manifest(hash=manifest_hash(payload), channels=tuple(raw.ch), period_ms=raw.p)


def parse_state(payload: bytes) -> State:
    """A node's state or will. Raises Malformed."""
    return _decode(_state, payload)


def manifest_hash(payload: bytes) -> str:
    """The first 8 hex digits of sha256 over the payload as it was published."""
    return hashlib.sha256(payload).hexdigest()[:8]


def ack_topic(node: str) -> str:
    return f"{ROOT}/{node}/ack"


def encode_ack(install: str, boot: int, seq: int) -> bytes:
    """Everything of the node up to and with `(boot, seq)` is durable."""
    return msgspec.json.encode((install, boot, seq))


GATEWAY_STATE = f"{ROOT}/gateway/state"
GATEWAY_TIME = f"{ROOT}/gateway/time"


def encode_gateway_state(st: str, ack_within_s: int = 0) -> bytes:
    """`up`, `full` or `lost`; and, where it is longer than a node expects, how long an ack may take."""
    return msgspec.json.encode({"st": st, "w": ack_within_s} if ack_within_s else {"st": st})


def encode_time(unix_ms: int, precision_ms: int, synchronised: bool) -> bytes:
    return msgspec.json.encode((unix_ms, precision_ms, synchronised))


T = TypeVar("T")


def _decode(decoder: msgspec.json.Decoder[T], payload: bytes) -> T:
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise Malformed("size", f"{len(payload)} bytes")
    try:
        return decoder.decode(payload)
    except UnicodeDecodeError as error:
        raise Malformed("encoding", str(error)) from None
    except msgspec.ValidationError as error:
        raise Malformed("type", str(error)) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise Malformed("encoding" if "utf-8" in str(error).lower() else "json", str(error)) from None
