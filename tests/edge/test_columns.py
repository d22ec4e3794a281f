"""The form `columns`: what was sent is what arrives, for less."""

from __future__ import annotations

import zlib

import msgspec
import pytest
from fieldpost.errors import Malformed
from fieldpost.forms import columns, decode, senml
from fieldpost.reading import Channel, Event, Manifest, Quality, Reading
from hypothesis import given
from hypothesis import strategies as st

INSTALL = "a1b2c3d4e5f6"
ONE = Manifest(
    "00112233", (Channel("temperature", "Cel", 100, "sim", "gauge"), Channel("n", "", 1, "n", "gauge")), 1000
)
TWO = Manifest("44556677", (Channel("co2", "ppm", 1, "sim", "gauge"),), 1000)
MANIFESTS = {one.hash: one for one in (ONE, TWO)}
VALUES = st.one_of(st.none(), st.integers(-(2**53), 2**53), st.sampled_from(["absent", "crc"]))


@st.composite
def batch(draw: st.DrawFn) -> list[Reading]:
    """Rows of some nodes as a route takes them: the order of (boot, seq) within each."""
    rows = []
    seqs: dict[tuple[str, int], int] = {}
    for _ in range(draw(st.integers(1, 30))):
        node, boot = draw(st.sampled_from(["n1", "n2"])), draw(st.integers(1, 2))
        manifest = draw(st.sampled_from([ONE, TWO]))
        seq = seqs[node, boot] = seqs.get((node, boot), -1) + draw(st.integers(1, 3))
        values = tuple(draw(VALUES) for _ in manifest.channels)
        time_ms, error_ms = draw(st.integers(0, 2**42)), draw(st.integers(-1, 10**6))
        quality = draw(st.sampled_from(Quality))
        rows.append(Reading(node, INSTALL, boot, seq, 0, time_ms, error_ms, manifest.hash, values, None, quality))
    return rows


@given(batch())
def test_both_forms_say_the_same(rows: list[Reading]) -> None:
    def by_node(body: bytes) -> dict[str, list[object]]:
        shown: dict[str, list[object]] = {}
        for row in decode(body):
            values = {name: value for name, value in row.values.items() if name != "nothing-due"}
            head = (row.id, round(row.time_s * 1000), round(row.error_s * 1000), row.quality, row.lane)
            shown.setdefault(row.node, []).append((head, values))
        return shown

    rows = [row for row in rows if any(value is not None for value in row.values)]
    as_columns = by_node(zlib.compress(columns.encode(rows, MANIFESTS, "backfill")))
    as_senml = by_node(senml.encode(rows, MANIFESTS, "backfill")) if rows else {}
    # The order is kept within a node, in the one form as in the other.
    assert {node: [head[0] for head, _ in shown] for node, shown in as_columns.items()} == {
        node: [head[0] for head, _ in shown] for node, shown in as_senml.items()
    }
    for node, shown in as_columns.items():
        for (head, values), (other, others) in zip(shown, as_senml[node], strict=True):
            assert head == other and values.keys() == others.keys()
            for name, (value, unit) in values.items():
                if isinstance(value, str):
                    assert others[name][0] == value
                else:
                    assert others[name] == (pytest.approx(value), unit)


def test_records_of_the_gateway_travel_too() -> None:
    gap = Event("gap", "n1", INSTALL, 1, 5, 9, "dropped by the node")
    thinned = Event("thinned", "n1", INSTALL, 1, 0, 4, "thinned: 5 rows")
    sent = [
        Reading("gateway", INSTALL, 3, 0, 10, 1000, 0, "", (), gap),
        Reading("gateway", INSTALL, 3, 1, 10, 2000, 50, ONE.hash, (2100, 2200, 2150, 5, None, None, None, 0), thinned),
    ]
    first, second = decode(columns.encode(sent, MANIFESTS))
    assert (first.id, first.event, first.values) == (f"gateway.{INSTALL}.3.0", gap, {})
    assert second.event == thinned
    assert second.values == {
        "n1/temperature/min": (21.0, "Cel"),
        "n1/temperature/max": (22.0, "Cel"),
        "n1/temperature/mean": (21.5, "Cel"),
        "n1/temperature/count": (5.0, ""),
        "n1/n/count": (0.0, ""),
    }


CHANNELS = [[bytes.fromhex(TWO.hash), [["co2", "ppm", 1]]]]


def table(**wrong: object) -> bytes:
    """A batch with one table of two rows, and something wrong in it."""
    good: dict[str, object] = {
        "kind": 0,
        "boots": [["n1", bytes.fromhex(INSTALL), 1]],
        "of": [0, 0],
        "seqs": [7, 1],
        "times": [1000, 1000],
        "errors": [50, 0],
        "qualities": [0, 0],
        "columns": [[400, 1]],
    }
    return msgspec.msgpack.encode([1, "", CHANNELS, [list((good | wrong).values())], []])


def test_a_batch_is_read_by_what_the_description_says() -> None:
    first, second = decode(table())
    assert (first.id, first.time_s, first.values) == (f"n1.{INSTALL}.1.7", 1.0, {"co2": (400.0, "ppm")})
    assert (second.id, second.time_s, second.values) == (f"n1.{INSTALL}.1.8", 2.0, {"co2": (401.0, "ppm")})
    rows = decode(table(seqs=[None, 2, 7, 1], columns=[{"v": ["crc", None]}]))
    assert [(row.seq, row.values) for row in rows] == [(7, {"co2": ("crc", "")}), (8, {})]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[",
        b"{",
        b"x",
        b"\x78\x9c",
        b"\xc1",
        msgspec.msgpack.encode([2, "", [], [], []]),
        table(kind=1),
        table(boots=[]),
        table(of=[0, 1]),
        table(seqs=[7]),
        table(seqs=[None, 2, 7]),
        table(seqs=[None, 10**9, 0, 1]),
        table(seqs=[7, None]),
        table(times=[]),
        table(qualities=[9, 0]),
        table(columns=[[400]]),
        table(columns=[{"v": [1]}]),
        table(columns=[[400, 1], [1, 1]]),
        table(columns=["abc"]),
    ],
)
def test_what_is_no_batch_is_malformed(body: bytes) -> None:
    with pytest.raises(Malformed):
        list(decode(body))


def test_a_batch_of_a_farm_costs_less_than_a_third_of_senml() -> None:
    rows = [
        Reading(
            f"n{n % 10}", INSTALL, 1, n // 10, n, 10**12 + n // 10 * 60_000 + n % 7, 50, ONE.hash, (2150 + n % 9, n)
        )
        for n in range(500)
    ]
    assert len(columns.encode(rows, MANIFESTS)) < len(senml.encode(rows, MANIFESTS)) / 3
    assert len(zlib.compress(columns.encode(rows, MANIFESTS))) < len(zlib.compress(senml.encode(rows, MANIFESTS))) / 3
