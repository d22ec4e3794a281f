"""A batch as bytes: whatever a reading holds comes back, and bytes that are none are a ValueError and nothing else."""

from __future__ import annotations

import zlib

import msgspec
import pytest
from fieldpost.reading import Event, Reading
from fieldpost.spool import codec
from hypothesis import given, settings
from hypothesis import strategies as st
from spools import readings

# MessagePack has integers of 64 bits, and a difference of two of them needs one more.
numbers = st.one_of(st.integers(-3, 3), st.integers(-(2**31), 2**31), st.integers(-(2**62), 2**62))
counts = st.one_of(st.integers(0, 5), st.integers(0, 2**53))
words = st.text(max_size=8)
values = st.one_of(st.none(), numbers, st.text(max_size=12))
events = st.builds(
    Event,
    st.sampled_from(["gap", "thinned", "presence"]),
    words,
    words,
    counts,
    counts,
    st.one_of(st.none(), counts),
    words,
)
rows = st.builds(
    Reading,
    st.sampled_from(["n1", "n2", "n3", ""]) | words,
    st.sampled_from(["a1b2c3d4e5f6", ""]),
    st.integers(0, 3) | counts,
    counts,
    counts,
    st.integers(-(2**53), 2**53),
    st.integers(-1, 2**40),
    st.sampled_from(["00112233", "44556677", ""]),
    st.lists(values, max_size=4).map(tuple),
    st.none() | events,
    st.integers(0, 4),
    st.integers(0, 100),
)
batches = st.lists(rows, max_size=30)


@given(batches)
def test_whatever_a_reading_holds_comes_back_in_the_same_order(batch: list[Reading]) -> None:
    assert codec.decode(codec.encode(batch)) == batch


@given(st.integers(1, 40), st.integers(0, 2**53), st.integers(0, 10**6), st.lists(st.booleans(), max_size=80))
def test_rows_at_a_steady_pace_come_back_also_where_one_breaks_it(
    count: int, first: int, step: int, late: list[bool]
) -> None:
    batch = []
    for n in range(count):
        at = first + n * step + (n < len(late) and late[n])
        batch.append(Reading("n1", "a1b2c3d4e5f6", 1, n, at, at + 7, 50, "00112233", (n * step, None if n % 9 else 1)))
    assert codec.decode(codec.encode(batch)) == batch


def test_the_largest_numbers_of_the_protocol_come_back() -> None:
    ends = (2**53, -(2**53), 0, 2**53, -(2**53))
    batch = [
        msgspec.structs.replace(one, values=(ends[n], -1, ends[-1 - n])) for n, one in enumerate(readings(0, len(ends)))
    ]
    assert codec.decode(codec.encode(batch)) == batch


@given(st.lists(rows, min_size=1, max_size=30))
def test_a_batch_as_schema_1_wrote_it_is_read(batch: list[Reading]) -> None:
    body = zlib.compress(msgspec.msgpack.encode(batch), 6)
    assert codec.decode(body) == batch


@given(st.integers(1, 30), st.data())
def test_a_batch_that_is_cut_short_is_a_value_error(count: int, data: st.DataObject) -> None:
    body = codec.encode(readings(0, count))
    cut = data.draw(st.integers(0, len(body) - 1))
    with pytest.raises(ValueError):
        codec.decode(body[:cut])


anything = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.text(max_size=5), st.binary(max_size=5)),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=30,
)


@settings(max_examples=60)
@given(st.one_of(anything, st.lists(anything, min_size=6, max_size=6).map(lambda rest: [3, *rest[1:]])))
def test_a_body_of_anything_else_is_a_value_error_or_a_batch(content: object) -> None:
    decoded_or_refused(zlib.compress(msgspec.msgpack.encode(content)))


@settings(max_examples=60)
@given(batches, st.data())
def test_a_body_with_a_flipped_bit_inside_is_a_value_error_or_a_batch(
    batch: list[Reading], data: st.DataObject
) -> None:
    """The checksum of the row says so before; but a checksum may be wrong too."""
    raw = bytearray(zlib.decompress(codec.encode(batch)))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    decoded_or_refused(zlib.compress(bytes(raw)))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_error_or_a_batch(body: bytes) -> None:
    decoded_or_refused(body)
    decoded_or_refused(zlib.compress(body))


def decoded_or_refused(body: bytes) -> None:
    try:
        found = codec.decode(body)
    except ValueError:
        return
    assert all(isinstance(one, Reading) for one in found)


def test_a_few_bytes_do_not_become_millions_of_readings() -> None:
    count = 1_000_001
    group = ["n1", "a1b2c3d4e5f6", 1, "00112233", 0, count, [[0, 1, 0]] * 6]
    with pytest.raises(ValueError, match=f"{count} readings"):
        codec.decode(zlib.compress(msgspec.msgpack.encode([3, count, [0, 0, 0], [group], [], b""])))


def test_a_reading_of_three_channels_costs_a_few_bytes() -> None:
    batch = [
        msgspec.structs.replace(one, values=(2150 + n * 7 % 5, 480 - n * 3 % 4, 101_325 + n * 11 % 9))
        for n, one in enumerate(readings(0, 5000))
    ]
    assert len(codec.encode(batch)) < 3 * len(batch)
