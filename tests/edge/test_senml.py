"""SenML packs: what is encoded is what arrives, and a failed read never looks like a number."""

from __future__ import annotations

import json
import zlib

import pytest
from fieldpost.errors import Malformed
from fieldpost.forms import senml
from fieldpost.reading import Channel, Event, Manifest, Reading
from fieldpost.routes import message, message_id
from hypothesis import given
from hypothesis import strategies as st

MANIFEST = Manifest(
    "00112233",
    (
        Channel("temperature", "Cel", 100, "sim", "gauge"),
        Channel("humidity", "%RH", 10, "sim", "gauge"),
        Channel("rain", "", 1, "sim", "counter"),
    ),
    60_000,
)
MANIFESTS = {MANIFEST.hash: MANIFEST}

values = st.tuples(*[st.none() | st.integers(-(2**40), 2**40) | st.sampled_from(["crc", "absent"])] * 3)
readings = st.builds(
    Reading,
    node=st.sampled_from(["n1", "greenhouse-2"]),
    install=st.sampled_from(["a1b2c3d4e5f6", "000000000000"]),
    boot=st.integers(0, 5),
    seq=st.integers(0, 2**53),
    uptime_ms=st.integers(0, 2**40),
    time_ms=st.integers(0, 2**42),
    error_ms=st.integers(-1, 10_000),
    manifest=st.just(MANIFEST.hash),
    values=values,
)


@given(st.lists(readings, max_size=30))
def test_what_is_encoded_arrives(sent: list[Reading]) -> None:
    arrived = list(senml.decode(senml.encode(sent, MANIFESTS)))
    in_order = sorted(sent, key=lambda one: [r.node for r in sent].index(one.node))
    assert [one.id for one in arrived] == [one.id for one in in_order]
    for there, here in zip(arrived, in_order, strict=True):
        assert round(there.time_s * 1000) == here.time_ms
        assert there.error_s == (-1 if here.error_ms < 0 else pytest.approx(here.error_ms / 1000))
        expected = {
            channel.name: value if isinstance(value, str) else pytest.approx(value / channel.scale)
            for channel, value in zip(MANIFEST.channels, here.values, strict=True)
            if value is not None
        }
        assert {name: value for name, (value, _) in there.values.items()} == expected


def test_a_pack_is_senml_that_a_stranger_can_read() -> None:
    row = Reading("n1", "a1b2c3d4e5f6", 3, 17, 5, 1_763_931_234_512, 50, "00112233", (2150, "crc", None))
    assert json.loads(senml.encode([row], MANIFESTS)) == [
        {
            "bn": "n1/",
            "i": "a1b2c3d4e5f6",
            "b": 3,
            "bt": 1763931234.512,
            "q": 17,
            "e": 0.05,
            "n": "temperature",
            "u": "Cel",
            "v": 21.5,
        },
        {"n": "humidity/fault", "vs": "crc"},
    ]


def test_gap_and_presence_records_arrive_as_what_they_are() -> None:
    event = Event("gap", "n1", "a1b2c3d4e5f6", 3, 10, None, 'why "not"')
    row = Reading("gateway", "ffffffffffff", 1, 0, 5, 1_763_931_234_512, 0, "", (), event)
    (arrived,) = senml.decode(zlib.compress(senml.encode([row], MANIFESTS)))
    assert (arrived.id, arrived.event) == ("gateway.ffffffffffff.1.0", event)


@pytest.mark.parametrize(
    "body",
    [b"", b"x", b"[", b'[{"n":"a","v":1}]', b'[{"q":"1"}]', zlib.compress(b"no")[:-3], zlib.compress(b"\xff"), b"{}"],
)
def test_what_is_no_pack_of_ours_is_malformed(body: bytes) -> None:
    with pytest.raises(Malformed):
        list(senml.decode(body))


def test_the_same_batch_has_the_same_message_id_and_another_one_another() -> None:
    rows = [Reading("n1", "a1b2c3d4e5f6", 1, seq, 0, 1_763_931_234_512, 50, "00112233", (1, 2, 3)) for seq in range(5)]
    assert message(rows, MANIFESTS) == message(rows, MANIFESTS)
    assert message_id(rows[:1]) == "n1.a1b2c3d4e5f6.1.0"
    assert len({message_id(rows[:n]) for n in range(1, 6)}) == 5


def test_a_message_is_compressed_where_that_makes_it_shorter() -> None:
    rows = [Reading("n1", "a1b2c3d4e5f6", 1, seq, 0, 1_763_931_234_512, 50, "00112233", (1, 2, 3)) for seq in range(50)]
    packed = message(rows, MANIFESTS)
    assert packed.content_encoding == "deflate"
    assert len(packed.body) * 5 < len(senml.encode(rows, MANIFESTS))
