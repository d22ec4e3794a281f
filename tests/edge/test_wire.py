"""The gateway's side of the contract: the golden messages of tests/wire/ mean what they say, no others pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fieldpost import wire
from fieldpost.errors import Malformed
from fieldpost.wire import Anchor, Data
from hypothesis import given
from hypothesis import strategies as st

GOLDEN: dict[str, list[dict[str, Any]]] = json.loads((Path(__file__).parents[1] / "wire" / "golden.json").read_text())
PARSERS = {"data": wire.parse_data, "manifest": wire.parse_manifest, "state": wire.parse_state}


@pytest.mark.parametrize("case", GOLDEN["data"], ids=lambda case: case["name"])
def test_rows_mean_what_the_golden_message_says(case: dict[str, Any]) -> None:
    said = case["gateway"]
    assert wire.parse_data(case["payload"].encode()) == Data(
        install=said["install"],
        boot=said["boot"],
        first_seq=said["first_seq"],
        uptime_ms=said["uptime_ms"],
        current=said["current"],
        anchor=Anchor(*said["anchor"]) if said["anchor"] else None,
        held=said["held"],
        drops=tuple((first, last) for first, last in said["drops"]),
        manifest=said["manifest"],
        ages_ms=tuple(said["ages_ms"]),
        rows=tuple(tuple(row) for row in said["rows"]),
    )


@pytest.mark.parametrize("case", GOLDEN["malformed"], ids=lambda case: f"{case['leaf']} {case['payload'][:60]}")
def test_what_is_not_the_protocol_is_rejected_with_its_reason(case: dict[str, Any]) -> None:
    with pytest.raises(Malformed) as caught:
        PARSERS[case["leaf"]](case["payload"].encode())
    assert caught.value.reason == case["why"]


@pytest.mark.parametrize("leaf", PARSERS)
@given(
    payload=st.binary(max_size=400)
    | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps).map(str.encode)
)
def test_any_bytes_are_a_value_or_malformed(leaf: str, payload: bytes) -> None:
    try:
        PARSERS[leaf](payload)
    except Malformed as malformed:
        assert malformed.reason in {"size", "encoding", "json", "version", "type", "range"}


def test_oversized_payloads_are_not_even_looked_at() -> None:
    with pytest.raises(Malformed, match="size"):
        wire.parse_data(b"[" * (wire.MAX_PAYLOAD_BYTES + 1))


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "fp1",
        "fp1/n1",
        "fp1/n1/data/x",
        "fp2/n1/data",
        "fp1/N1/data",
        "fp1//data",
        "fp1/gateway/state",
        "fp1/file/data",
        "fp1/" + "a" * 33 + "/data",
        "fp1/n\n/data",
        "fp1/ñ/data",
    ],
)
def test_topics_that_are_not_a_nodes_are_rejected(topic: str) -> None:
    with pytest.raises(Malformed, match="topic"):
        wire.parse_topic(topic)


def test_what_the_gateway_sends_is_the_golden_message() -> None:
    (ack,) = GOLDEN["ack"]
    assert wire.encode_ack(ack["install"], ack["boot"], ack["seq"]) == ack["payload"].encode()
    for state in GOLDEN["gateway_state"]:
        assert wire.encode_gateway_state(state["st"], state.get("ack_within_s", 0)) == state["payload"].encode()
    (time,) = GOLDEN["time"]
    assert wire.encode_time(time["unix_ms"], time["precision_ms"], time["synchronised"]) == time["payload"].encode()


def test_wills_and_manifests_are_understood() -> None:
    (will,) = GOLDEN["will"]
    state = wire.parse_state(will["payload"].encode())
    assert (state.st, state.install, state.boot, state.connection) == ("lost", will["install"], 3, 2)
    (manifest,) = GOLDEN["manifest"]
    parsed = wire.parse_manifest(manifest["payload"].encode())
    assert [[c.name, c.unit, c.scale, c.sensor, c.kind] for c in parsed.channels] == manifest["channels"]
    assert (parsed.hash, parsed.period_ms) == (wire.manifest_hash(manifest["payload"].encode()), 60_000)
