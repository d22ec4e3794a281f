"""SenML JSON (RFC 8428): one pack a batch, readings grouped by node, their order kept within a node.

Base name is `<node>/`, base time the row's. Besides RFC 8428's labels a record may carry ours; like base fields they
hold until changed, and a reader that does not know them may ignore them (section 4.4):

- `i`, `b`, `q`: install, boot and seq, with the node's name the identity of the row that begins here;
- `e`: the row was measured within that many seconds of its time; -1: not later than its time, earliest not known;
- `tq`: what the date rests on, where that is not a gateway whose clock is set: `anchored` (the node counted on from
  a time that it had heard), `bounded` (an interval: the boot never heard the time), `corrected` (the gateway's clock
  was set later, and the date with it), `unsynced` (it has not been set yet: only distances are right);
- `lane`: `urgent`, or `backfill` for history that follows after an outage; absent: live;
- `about`: of a gap, thinned or presence record, `[node, install, boot, first, last]`.

A thinned record stands for the rows that it is about: each channel as `<node>/<channel>/min`, `max`, `mean`, `count`.

A failed read is a string value under the name `<channel>/fault`, so that it is never taken for a number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from ..errors import Malformed
from ..reading import Channel, Event, Manifest, Quality, Reading
from .arrived import QUALITIES, Arrived, unpacked

CONTENT_TYPE = "application/senml+json"


def encode(readings: Sequence[Reading], manifests: Mapping[str, Manifest], lane: str = "") -> bytes:
    """A pack. Every manifest that the readings name must be in `manifests`."""
    by_node: dict[str, list[Reading]] = {}
    for reading in readings:
        by_node.setdefault(reading.node, []).append(reading)
    records: list[str] = []
    quality = int(Quality.SYNCED)
    for rows in by_node.values():
        quality = _encode_node(rows, manifests, records, lane, quality)
        lane = ""  # said once, it holds for the pack
    return ("[" + ",".join(records) + "]").encode()


def _encode_node(
    rows: Iterable[Reading], manifests: Mapping[str, Manifest], records: list[str], lane: str, quality: int
) -> int:
    boot: tuple[str, int] | None = None
    error_ms: int | None = None
    prefixes: dict[str, list[tuple[str, str, int]]] = {}
    for row in rows:
        head = f'"bt":{row.time_ms / 1000:.3f},"q":{row.seq},'
        if (row.install, row.boot) != boot:
            first = f'"bn":"{row.node}/",' if boot is None else ""
            head = f'{first}"i":"{row.install}","b":{row.boot},{head}'
            if lane:
                head += f'"lane":"{lane}",'
                lane = ""
            boot = (row.install, row.boot)
        if row.quality != quality:
            quality = row.quality
            head += f'"tq":"{QUALITIES[Quality(quality)]}",'
        if row.error_ms != error_ms:
            head += f'"e":{row.error_ms / 1000 if row.error_ms >= 0 else -1:g},'
            error_ms = row.error_ms
        if row.event is not None:
            records.append("{" + head + _event(row.event) + "}")
            if row.values:
                records += _figures(row, manifests)
            continue
        columns = prefixes.get(row.manifest)
        if columns is None:
            columns = prefixes[row.manifest] = [_labels(c) for c in manifests[row.manifest].channels]
        for value, (number, fault, scale) in zip(row.values, columns, strict=False):
            if isinstance(value, int):
                records.append(f"{{{head}{number}{value if scale == 1 else value / scale}}}")
            elif value is not None:
                records.append(f'{{{head}{fault}"{value}"}}')
            else:
                continue
            head = ""
        if head:  # nothing was due in this row: its identity travels all the same
            records.append("{" + head + '"n":"nothing-due","vb":true}')
    return quality


def _figures(row: Reading, manifests: Mapping[str, Manifest]) -> Iterator[str]:
    """The values of a thinned record, four for each channel."""
    assert row.event is not None
    channels = manifests[row.manifest].channels
    for number, channel in enumerate(channels):
        for kind, value in zip(("min", "max", "mean", "count"), row.values[4 * number : 4 * number + 4], strict=False):
            if isinstance(value, int):
                name = f"{row.event.node}/{channel.name}/{kind}"
                unit = f'"u":{_text(channel.unit)},' if channel.unit and kind != "count" else ""
                yield f'{{"n":"{name}",{unit}"v":{value if kind == "count" else value / channel.scale}}}'


def _labels(channel: Channel) -> tuple[str, str, int]:
    unit = f'"u":{_text(channel.unit)},' if channel.unit else ""
    return f'"n":"{channel.name}",{unit}"v":', f'"n":"{channel.name}/fault","vs":', channel.scale


def _event(event: Event) -> str:
    about = msgspec.json.encode((event.node, event.install, event.boot, event.first, event.last)).decode()
    return f'"n":"{event.kind}","vs":{_text(event.why)},"about":{about}'


def _text(value: str) -> str:
    return msgspec.json.encode(value).decode()


class _Record(msgspec.Struct):
    bn: str | None = None
    bt: float | None = None
    i: str | None = None
    b: int | None = None
    q: int | None = None
    e: float | None = None
    n: str = ""
    u: str = ""
    v: float | None = None
    vs: str | None = None
    tq: str | None = None
    lane: str | None = None
    about: tuple[str, str, int, int, int | None] | None = None


_pack = msgspec.json.Decoder(list[_Record])


def decode(body: bytes) -> Iterator[Arrived]:
    """The rows of a pack, zlib'd or plain. Raises Malformed where it is not one of ours."""
    try:
        records = _pack.decode(unpacked(body))
    except msgspec.MsgspecError as error:
        raise Malformed("senml", str(error)) from None
    node, install, boot, time_s, error_s = "", "", 0, 0.0, 0.0
    quality, lane = "synced", ""
    row: Arrived | None = None
    for record in records:
        node = record.bn.rstrip("/") if record.bn is not None else node
        install = record.i if record.i is not None else install
        boot = record.b if record.b is not None else boot
        time_s = record.bt if record.bt is not None else time_s
        error_s = record.e if record.e is not None else error_s
        quality = record.tq if record.tq is not None else quality
        lane = record.lane if record.lane is not None else lane
        if record.q is not None:
            if row is not None:
                yield row
            row = Arrived(node, install, boot, record.q, time_s, error_s, quality=quality, lane=lane)
        if row is None:
            raise Malformed("senml", "a record before the first `q`")
        if record.about is not None:
            row.event = Event(record.n, *record.about, why=record.vs or "")
        elif record.v is not None:
            row.values[record.n] = (record.v, record.u)
        elif record.vs is not None:
            row.values[record.n.removesuffix("/fault")] = (record.vs, record.u)
    if row is not None:
        yield row
