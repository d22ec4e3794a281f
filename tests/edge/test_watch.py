"""What somebody upstream sees: counted right, also when it comes twice, late or broken."""

from __future__ import annotations

from fieldpost.forms import senml
from fieldpost.reading import Channel, Event, Manifest, Reading
from fieldpost.watch import Tally, sparkline

MANIFEST = Manifest("00112233", (Channel("temperature", "Cel", 100, "sim", "gauge"),), 1000)


def pack(*seqs: int, boot: int = 1) -> bytes:
    rows = [Reading("n1", "a1b2c3d4e5f6", boot, s, s, 1_763_900_000_000 + s, 50, "00112233", (2000 + s,)) for s in seqs]
    return senml.encode(rows, {"00112233": MANIFEST})


def test_repeats_are_known_by_their_ids_and_disorder_is_counted() -> None:
    tally = Tally()
    assert [repeat for _, repeat in tally.take(pack(0, 1, 2))] == [False, False, False]
    assert [repeat for _, repeat in tally.take(pack(1, 2, 3))] == [True, True, False]
    tally.take(pack(6))
    tally.take(pack(5))
    tally.take(pack(0, boot=2))
    node = tally.nodes["n1"]
    assert (node.readings, node.repeats, node.disordered) == (7, 2, 1)
    assert node.channels["temperature"].value == 20.0


def test_gaps_and_presence_belong_to_the_node_that_they_are_about() -> None:
    tally = Tally()
    events = [
        Event("gap", "n1", "a1b2c3d4e5f6", 1, 3, 9, "dropped by the node"),
        Event("gap", "n1", "a1b2c3d4e5f6", 1, 20, None, "perhaps lost with the node's memory"),
        Event("presence", "n1", "a1b2c3d4e5f6", 1, 1, None, "lost"),
    ]
    rows = [Reading("gateway", "f" * 12, 1, n, 0, 1, 0, "", (), event) for n, event in enumerate(events)]
    for _ in range(2):
        tally.take(senml.encode(rows, {}))
    node = tally.nodes["n1"]
    assert (node.gaps, node.missing, node.state, tally.repeats) == (2, 7, "lost", 3)
    assert node.newest_gap == "20-? of boot 1: perhaps lost with the node's memory"
    assert list(tally.nodes) == ["n1"]


def test_what_is_not_understood_is_counted() -> None:
    tally = Tally()
    assert tally.take(b"\x00rubbish") == []
    assert (tally.malformed, tally.readings) == (1, 0)


def test_a_sparkline_goes_from_the_smallest_to_the_largest() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([5.0, 5.0]) == "▁▁"
    assert sparkline([]) == ""
