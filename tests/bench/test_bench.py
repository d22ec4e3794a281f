"""The benchmarks' own arithmetic: what they read, count and report. How fast anything is, no test says."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench import report
from bench.farm import DAY_S, Day, Month
from bench.load import CLIMATE, STATION, Node, Walk, manifest
from bench.meters import Line, Traffic, cpu_seconds, rss_mb, sectors_written, tcp_traffic
from bench.plot import plot
from bench.rate import percentile
from bench.report import Figure

HERE = Path(__file__).parent


def packet(payload: int, *, port: int = 5671, options: int = 12, protocol: int = 6) -> bytes:
    """The headers of an IP packet that carries so many bytes of TCP's payload to a port."""
    length = 20 + 20 + options + payload
    ip = struct.pack("!BBHHHBBHII", 0x45, 0, length & 0xFFFF, 0, 0, 64, protocol, 0, 0, 0)
    tcp = struct.pack("!HHIIBBHHH", 40_000, port, 0, 0, (20 + options) // 4 << 4, 0, 0, 0, 0)
    return ip + tcp + bytes(options)


def test_packet_counts_with_its_headers() -> None:
    assert tcp_traffic(packet(100), 5671) == Traffic(1, 100, 152)
    assert tcp_traffic(packet(0), 5671) == Traffic(1, 0, 52)


def test_large_packet_of_loopback_counts_as_the_packets_that_a_line_would_carry() -> None:
    assert tcp_traffic(packet(1448), 5671) == Traffic(1, 1448, 1500)
    assert tcp_traffic(packet(1449), 5671) == Traffic(2, 1449, 1449 + 2 * 52)
    assert tcp_traffic(packet(4000), 5671) == Traffic(3, 4000, 4000 + 3 * 52)


def test_packets_of_others_do_not_count() -> None:
    assert tcp_traffic(packet(100), 5672) is None
    assert tcp_traffic(packet(100, protocol=17), 5671) is None
    assert tcp_traffic(b"\x45", 5671) is None


def test_line_counts_what_a_connection_carries_or_says_who_may_listen() -> None:
    if os.geteuid() != 0:
        with pytest.raises(SystemExit, match="root"), Line(1):
            pass
        return
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with Line(port) as line:
            near = socket.create_connection(("127.0.0.1", port))
            far, _ = server.accept()
            near.sendall(bytes(700))
            while len(far.recv(1000, socket.MSG_PEEK)) < 700:
                pass
            near.close()
            far.close()
            while (seen := line.seen()).payload < 700:
                pass
    assert seen.payload == 700
    assert seen.ip >= 700 + 5 * 40


def test_sectors_written_are_the_seventh_field() -> None:
    assert sectors_written("133 0 2756 23 24 71 17156 3 0 28 28 2 0 131074 0 4 0\n") == 17_156


def test_own_process_has_used_time_and_memory() -> None:
    assert cpu_seconds(os.getpid()) > 0
    assert 5 < rss_mb(os.getpid()) <= rss_mb(os.getpid(), peak=True)


def test_figure_says_whether_its_bound_is_kept() -> None:
    assert Figure("a", 5, "MB", most=5).reached
    assert not Figure("a", 5.1, "MB", most=5).reached
    assert Figure("a", 12_000, "/s", least=12_000).reached
    assert not Figure("a", 11_999, "/s", least=12_000).reached
    assert Figure("a", 11_999, "/s", least=12_000).row() == ("a", ">= 12,000", "11,999 /s", "**missed**", "")
    assert Figure("a", 1, "").row() == ("a", "", "1.00", "", "")


def test_numbers_keep_three_figures() -> None:
    assert [report.number(n) for n in (0, 0.0123, 0.5, 1.234, 12.34, 123.4, 12_345)] == [
        "0",
        "0.012",
        "0.50",
        "1.23",
        "12.3",
        "123",
        "12,345",
    ]


def test_topic_that_is_not_run_keeps_its_section(tmp_path: Path) -> None:
    path, topics = tmp_path / "RESULTS.md", ["one", "two"]
    report.put(path, topics, {"two": "## two: second\n\nold\n"})
    report.put(path, topics, {"one": "## one: first\n\nthings\n"})
    assert report.sections(path.read_text()) == {"one": "## one: first\n\nthings\n", "two": "## two: second\n\nold\n"}
    report.put(path, topics, {"two": "## two: second\n\nnew\n"})
    assert report.sections(path.read_text())["two"].endswith("new\n")
    assert path.read_text().index("## one") < path.read_text().index("## two")


def test_empty_column_of_a_table_is_left_out() -> None:
    assert report.table(("a", "b", "c"), [("1", "", "x"), ("2", "", "")]) == [
        "| a | c |",
        "|---|---|",
        "| 1 | x |",
        "| 2 |  |",
    ]


def test_part_of_a_day_is_scaled_to_a_whole_one() -> None:
    half = Day(DAY_S / 2, 7_200, 7_200, 2_000_000, 500_000, 50, 10.0, 0)
    assert half.card_mb == 4.5  # it ends once
    assert half.row("half") == ["half", "12.00", "7,200", "7,200", "4.50", "312", "100", "20"]


def test_month_holds_its_minutes_and_one_lost_link_a_day() -> None:
    month = Month(10, Traffic(0, 0, 5_000), Traffic(0, 0, 10_000), 100)
    assert month.mb == pytest.approx(30 * (500 * 1440 + 10_000) / 1e6)


def test_percentile_is_the_value_below_which_the_share_lies() -> None:
    values = list(range(100, 0, -1))
    assert percentile(values, 0.5) == 51
    assert percentile(values, 0.99) == 100
    assert percentile([7], 0.99) == 7


def test_plot_is_svg_with_a_point_for_each_value() -> None:
    drawn = ElementTree.fromstring(plot("A <title>", "across", "up", {"line": [(1000, 2.0), (10_000, 3.5)]}))
    svg = "{http://www.w3.org/2000/svg}"
    across = [float(c.get("cx", "")) for c in drawn.iter(f"{svg}circle")]
    assert len(across) == 2
    assert across == sorted(across)
    assert "A <title>" in [text.text for text in drawn.iter(f"{svg}text")]


def test_walk_is_the_same_each_time_and_wanders_by_little() -> None:
    one, two = Walk(3, len(STATION)), Walk(3, len(STATION))
    rows = [one.next() for _ in range(50)]
    assert rows == [two.next() for _ in range(50)]
    assert all(abs(a[0] - b[0]) <= 3 for a, b in itertools.pairwise(rows))


async def test_node_sends_again_from_where_an_ack_is_said_twice() -> None:
    sent: list[list[object]] = []
    node = Node("n1", "a1b2c3d4e5f6", says=manifest(*CLIMATE), walk=Walk(1))
    node.connection.publish = lambda topic, payload, retain=False: sent.append(json.loads(payload))  # type: ignore[method-assign]
    for _ in range(3):
        node.send_one()
    node._take(b"fp1/n1/ack", b'["a1b2c3d4e5f6",1,0]')
    assert [message[3] for message in sent] == [0, 1, 2]
    node._take(b"fp1/n1/ack", b'["a1b2c3d4e5f6",1,0]')
    assert sent[-1][3] == 1
    assert [row[1:] for row in sent[-1][9]] == [row[1:] for message in sent[1:3] for row in message[9]]  # type: ignore[attr-defined]
    node._take(b"fp1/n1/ack", b'["a1b2c3d4e5f6",1,2]')
    await asyncio.wait_for(node.all_acked(), 1)


async def test_flood_goes_back_to_what_was_refused() -> None:
    node = Node("n1", "a1b2c3d4e5f6", rows=10, window=40)
    firsts: list[int] = []
    node.connection.publish = lambda topic, payload, retain=False: firsts.append(json.loads(payload)[3])  # type: ignore[method-assign]

    async def acknowledge(*seqs: int) -> None:
        for seq in seqs:
            node._take(b"fp1/n1/ack", json.dumps(["a1b2c3d4e5f6", 1, seq]).encode())
            await asyncio.sleep(0)

    async with asyncio.timeout(5):
        flood = asyncio.create_task(node.flood(50))
        await asyncio.sleep(0)
        await acknowledge(9, 9, 49)
        await flood
    assert firsts == [0, 10, 20, 30, 40, 10, 20, 30, 40]


def test_clocks_and_timeouts_run_fast_together() -> None:
    said = subprocess.run(
        [sys.executable, "-c", _FAST_CLOCKS, str(HERE)], capture_output=True, text=True, check=True, timeout=20
    ).stdout
    real, *fast = map(float, said.split())
    assert real < 20  # a minute of three clocks and an event loop
    assert all(60 <= seconds < 60 + 100 * real for seconds in fast)


_FAST_CLOCKS = """
import sys, time
sys.path.insert(0, sys.argv[1])
from fast import speed_up
real = time.perf_counter
speed_up(100)
import asyncio
clocks = (time.monotonic, time.time, lambda: time.clock_gettime_ns(time.CLOCK_BOOTTIME) / 1e9)
began, first = real(), [clock() for clock in clocks]
asyncio.run(asyncio.sleep(60))
print(real() - began, *(clock() - at for clock, at in zip(clocks, first)))
"""
