"""Tests of the node's modules as plain functions: CPython and MicroPython run the same file.

micropython tests/device/plain.py FOLDER GOLDEN
"""

import json
import os
import sys

if sys.implementation.name != "micropython":
    import host

    host.install()

import wire
from clock import Clock, Identity, write_whole
from outbox import Message, Outbox
from sample import Sampler
from settings import Settings, SettingsError

MANIFEST = (b'{"ch":[]}', "0011aabb")
GOOD = {"node": "n1", "key": "k", "gateways": [["127.0.0.1", 1883]]}


def box(folder, boot=1, **limits):
    return Outbox(folder + "/outbox", boot, MANIFEST, **limits)


def fill(outbox, count, start=0):
    for n in range(start, start + count):
        outbox.put(n * 1000, [n, None, "crc"])


def send_all(outbox, limit=5):
    """Everything that the outbox hands out without an ack, as (boot, seqs)."""
    sent, messages = (-1, -1), []
    while True:
        message = outbox.next(sent, limit)
        if message is None:
            return messages
        sent = message.last()
        messages.append((message.boot, [row[0] for row in message.rows]))


def test_golden_messages_are_what_the_node_sends(folder, golden):
    for case in golden["data"]:
        said = case["node"]["message"]
        rows = [(row[0], row[1], row[2]) for row in said["rows"]]
        message = Message(
            said["boot"], said["current"], said["first"], rows, said["held"], said["drops"], said["anchor"], "0011aabb"
        )
        payload = wire.data("a1b2c3d4e5f6", message, case["node"]["uptime_ms"], "0011aabb")
        assert payload == case["payload"].encode(), (case["name"], payload)
    for case in golden["will"]:
        will = json.loads(wire.will(case["install"], case["boot"], case["connection"]))
        assert will == json.loads(case["payload"])
    for case in golden["manifest"]:
        payload, hash_ = wire.manifest(case["channels"], case["period_ms"])
        assert json.loads(payload) == json.loads(case["payload"])
        assert len(hash_) == 8


def test_golden_messages_of_the_gateway_are_understood(folder, golden):
    for case in golden["ack"]:
        assert wire.parse_ack(case["payload"].encode()) == (case["install"], case["boot"], case["seq"])
    for case in golden["gateway_state"]:
        assert wire.parse_gateway_state(case["payload"].encode()) == (case["st"], case.get("ack_within_s", 0))
    for case in golden["time"]:
        assert wire.parse_time(case["payload"].encode()) == (case["unix_ms"], case["precision_ms"])
    for bad in (b"", b"\xff", b"[]", b"{}", b"[1,2]", b'["a",1,"b"]', b"null", b"7"):
        assert wire.parse_ack(bad) is None
        assert wire.parse_time(bad) is None
        assert wire.parse_gateway_state(bad) == ("lost", 0)


def test_rows_come_out_oldest_first_and_only_ack_frees(folder, golden):
    outbox = box(folder)
    fill(outbox, 12)
    assert send_all(outbox) == [(1, [0, 1, 2, 3, 4]), (1, [5, 6, 7, 8, 9]), (1, [10, 11])]
    assert send_all(outbox) == send_all(outbox)
    outbox.acked(1, 6)
    assert len(outbox) == 5
    message = outbox.next((-1, -1), 3)
    assert (message.first, message.held, message.current) == (7, 7, True)
    outbox.acked(1, 11)
    assert len(outbox) == 0 and outbox.next((-1, -1), 3) is None


def test_spilled_rows_survive_a_reboot_and_go_before_newer_ones(folder, golden):
    outbox = box(folder)
    outbox.know_time(500, 1763900000000, 20)
    fill(outbox, 300)
    outbox.spill()
    fill(outbox, 5, 300)  # in RAM: these die
    later = box(folder, boot=2)
    fill(later, 3)
    message = later.next((-1, -1), 4)
    assert (message.boot, message.current, message.first, message.held) == (1, False, 0, 0)
    assert message.anchor == [500, 1763900000000, 20]
    assert message.rows[0] == (0, 0, [0, None, "crc"])
    sent = send_all(later, 50)
    assert [seq for _, seqs in sent for seq in seqs] == list(range(300))
    assert all(boot == 1 for boot, _ in sent), "newer rows wait until the older boot is acknowledged"
    later.acked(1, 299)
    assert send_all(later, 50) == [(2, [0, 1, 2])]
    later.acked(2, 2)
    assert [name for name in os.listdir(folder + "/outbox") if name[0].isdigit()] == []


def test_at_the_limit_the_oldest_rows_are_dropped_counted_and_declared(folder, golden):
    outbox = box(folder, rows=40, max_bytes=9000)
    fill(outbox, 1000)
    message = outbox.next((-1, -1), 10)
    assert message.drops == [[0, message.first - 1]]
    assert message.held == message.first
    kept = len(outbox)
    assert kept == 1000 - message.first
    again = box(folder, boot=2)  # the drops are still known after a reboot
    assert again.next((-1, -1), 1).drops == message.drops
    outbox.acked(1, 999)
    assert outbox.next((-1, -1), 1) is None


def test_drops_of_a_boot_without_rows_are_declared_until_they_are_acknowledged(folder, golden):
    outbox = box(folder, rows=40, max_bytes=4096)
    fill(outbox, 200)
    outbox.spill()
    later = box(folder, boot=2, rows=40, max_bytes=4096)
    fill(later, 400)  # pushes every row of boot 1 out
    message = later.next((-1, -1), 5)
    assert (message.boot, message.rows, message.drops) == (1, [], [[0, 199]])
    assert message.first == message.held == 200
    assert later.next(message.last(), 5) is None, "and nothing else before that is acknowledged"
    later.acked(1, 199)
    assert later.next((-1, -1), 5).boot == 2


def test_a_changed_bit_is_a_drop_and_no_wrong_value(folder, golden):
    outbox = box(folder)
    fill(outbox, 30)
    outbox.spill()
    path = [folder + "/outbox/" + name for name in os.listdir(folder + "/outbox") if name[0].isdigit()][0]
    with open(path, "rb") as file:
        lines = file.read().split(b"\n")
    line = bytearray(lines[11])  # behind the header: seq 10
    line[3] ^= 1
    lines[11] = bytes(line)
    with open(path, "wb") as file:
        file.write(b"\n".join(lines))
    later = box(folder, boot=2)
    sent = send_all(later, 50)
    assert sent == [(1, list(range(10))), (1, list(range(11, 30)))], sent
    assert later.next((-1, -1), 50).drops == [[10, 10]]


def test_a_torn_segment_is_told_as_drops(folder, golden):
    outbox = box(folder)
    fill(outbox, 30)
    outbox.spill()
    path = [folder + "/outbox/" + name for name in os.listdir(folder + "/outbox") if name[0].isdigit()][0]
    with open(path, "rb") as file:
        content = file.read()
    for size in (0, 1, 20, len(content) // 2, len(content) - 1):
        with open(path, "wb") as file:
            file.write(content[:size])
        later = box(folder, boot=2)
        rows, drops = [], []
        sent = (-1, -1)
        while True:
            message = later.next(sent, 50)
            if message is None:
                break
            sent = message.last()
            rows += [row[0] for row in message.rows]
            drops = message.drops
        dropped = [seq for first, last in drops for seq in range(first, last + 1)]
        assert sorted(rows + dropped) == list(range(30)), (size, rows, drops)
        later.acked(1, 29)
        with open(path, "wb") as file:
            file.write(content)


def test_a_half_written_file_is_taken_away(folder, golden):
    os.mkdir(folder + "/outbox")
    with open(folder + "/outbox/1-0-5.new", "w") as file:
        file.write("half")
    assert box(folder, boot=2).next((-1, -1), 5) is None
    assert os.listdir(folder + "/outbox") == []


def test_the_boot_counter_rises_and_an_unreadable_one_makes_a_new_install(folder, golden):
    first = Identity(folder, None)
    second = Identity(folder, None)
    assert (second.install, second.boot) == (first.install, first.boot + 1)
    for rubbish in ("", "[", "[1,2]", '["short",3]', '["a1b2c3d4e5f6",-1]', "\x00\x00"):
        write_whole(folder + "/boot.json", rubbish)
        fresh = Identity(folder, None)
        assert fresh.boot == 1 and fresh.install != first.install
    given = Identity(folder, "a1b2c3d4e5f6")
    assert (given.install, given.boot) == ("a1b2c3d4e5f6", 1)


def test_settings_tell_every_fault(folder, golden):
    settings = Settings(GOOD)
    assert (settings.period_ms, settings.gateways) == (60000, [("127.0.0.1", 1883)])
    bad = {"node": "N 1", "gateways": [["x"]], "period_ms": 1, "keepalive_s": "60", "install": "xyz"}
    try:
        Settings(bad)
    except SettingsError as error:
        for name in ("node", "key", "gateways", "period_ms", "keepalive_s", "install"):
            assert name + ":" in str(error), error
    else:
        raise AssertionError("accepted")


def test_missed_periods_are_counted_and_not_made_up_for(folder, golden):
    sampler = Sampler(["simulated:climate"], 1000)
    assert sampler.due_in(0) == 0
    assert len(sampler.row(0)) == len(sampler.channels()) == 3
    assert sampler.due_in(400) == 600
    sampler.row(3500)
    assert (sampler.missed, sampler.due_in(3500)) == (2, 500)


def test_uptime_grows(folder, golden):
    clock = Clock()
    assert 0 <= clock.uptime_ms() <= clock.uptime_ms()


def remove(folder):
    for name in os.listdir(folder):
        try:
            os.remove(folder + "/" + name)
        except OSError:
            remove(folder + "/" + name)
            os.rmdir(folder + "/" + name)


TESTS = sorted(name for name in globals() if name.startswith("test_"))


if __name__ == "__main__":
    with open(sys.argv[2]) as golden_file:
        messages = json.load(golden_file)
    for test in TESTS:
        remove(sys.argv[1])
        globals()[test](sys.argv[1], messages)
        print("passed", test)
    print(len(TESTS), "passed")
