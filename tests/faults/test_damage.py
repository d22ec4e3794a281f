"""Whatever is wrong with the spool's file: the spool starts, and what is not damaged is delivered."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import sqlite3
import subprocess
import sys
import zlib
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from fieldpost.reading import Reading
from fieldpost.spool.database import PAGE_BYTES
from parts import REPO, Gateway
from spools import INSTALL, KEY, MANIFEST, own, reading, readings, spool_in, taken

from faults import damage
from faults.damage import MAIN, WAL, Found, Store, cuts, flipped, flips, judge, look, unnamed

SEED = int(os.environ.get("DAMAGE_SEED", "20261124"))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A spool whose machine lost its power: a file and a log."""
    return made(damage.build, tmp_path_factory.mktemp("killed") / "built")


@pytest.fixture(scope="module")
def rested(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A spool that was stopped: one file."""
    return made(damage.build_rested, tmp_path_factory.mktemp("rested") / "built")


def made(build: Callable[[Path], Coroutine[None, None, Store]], folder: Path) -> Store:
    """Built in a loop of its own: a test's is running already."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(build(folder))).result()


@pytest.mark.parametrize("count", [12, pytest.param(250, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", damage.STORES)
async def test_a_flipped_bit_costs_no_more_than_its_own_batch_and_never_makes_a_wrong_value(
    kind: str, count: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    store: Store = request.getfixturevalue(kind)
    chosen = random.Random(SEED + count)
    damages = chosen.sample([*flips(store, lambda at: (at * 5 + SEED) % 8)], count)
    total = await damage.sample(store, damages, tmp_path, most_lost=damage.STORES[kind][2])
    assert total.faults == [], f"DAMAGE_SEED={SEED}"


@pytest.mark.parametrize("count", [12, pytest.param(150, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", damage.STORES)
async def test_a_file_that_was_cut_short_is_read_as_far_as_it_goes(
    kind: str, count: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    store: Store = request.getfixturevalue(kind)
    damages = random.Random(SEED + count).sample([*cuts(store)], count)
    total = await damage.sample(store, damages, tmp_path, most_lost=None)
    assert total.faults == [], f"DAMAGE_SEED={SEED}"


async def test_a_flipped_bit_in_the_log_costs_no_commit_behind_it(killed: Store, tmp_path: Path) -> None:
    damages = [d for d in flips(killed, lambda at: at % 3) if d.which == "wal"]
    total = await damage.sample(killed, random.Random(SEED).sample(damages, 25), tmp_path, most_lost=20)
    # The checksum can't tell where the highest bits of a word have flipped: then the row's own tells that it did.
    assert total.faults == [] and total.lossless >= 20


async def test_several_flipped_bits_in_the_log_cost_no_commit_behind_them(killed: Store, tmp_path: Path) -> None:
    wal = killed.files[WAL]
    for at in (40, 1200, 2300, 2301, 5000):
        wal = flipped(wal, at, 1)
    found = await opened(killed, tmp_path, wal=wal)
    assert judge(killed, found, most_lost=20) == []
    assert "n2.a1b2c3d4e5f6.1.39" in found.delivered["a"]  # of the last commit


@pytest.mark.parametrize("first", [1, 2, 3, 4, 8, 20])
async def test_zero_filled_pages_cost_what_was_in_them(rested: Store, tmp_path: Path, first: int) -> None:
    main = bytearray(rested.files[MAIN])
    main[(first - 1) * PAGE_BYTES : first * PAGE_BYTES] = bytes(PAGE_BYTES)
    found = await opened(rested, tmp_path, main=bytes(main))
    assert judge(rested, found) == []
    got = len(found.delivered["a"])
    # The first four are the header, the pointer map, the root of the batches and the state: no reading is in them.
    assert got >= len(rested.outstanding["a"]) if first <= 4 else got > 0
    assert found.upto == rested.upto if first <= 4 else True


async def test_a_log_that_is_gone_is_told(killed: Store, tmp_path: Path) -> None:
    tmp_path.joinpath("spool.open").touch()  # a killed gateway leaves it
    found = await opened(killed, tmp_path, wal=None)
    assert judge(killed, found) == []
    assert found.ledger["damaged on the card"] >= 1 and any("write-ahead log" in gap.why for gap in found.gaps)
    assert "n1.a1b2c3d4e5f6.1.59" in found.delivered["a"]  # of the file


async def test_a_torn_tail_of_the_log_is_a_commit_that_nobody_was_told_of(killed: Store, tmp_path: Path) -> None:
    store, wal = killed, killed.files[WAL]
    frame = 24 + PAGE_BYTES
    last = max(
        at for at in range(32, len(wal) - frame, frame) if int.from_bytes(wal[at + 4 : at + 8]) and salt(wal, at)
    )
    found = await opened(store, tmp_path, wal=wal[: last + 500] + bytes(len(wal) - last - 500))
    assert found.started and found.gaps == [] and not found.ledger.get("damaged on the card")
    assert found.upto[KEY] == 79 and found.upto["n2", INSTALL, 1] == 19  # the node sends 20 to 39 again, they are taken


def salt(wal: bytes, at: int) -> bool:
    return wal[at + 8 : at + 16] == wal[16:24]


ODD: dict[str, Callable[[Path], None]] = {
    "zero-filled": lambda path: path.write_bytes(bytes(8192)),
    "empty": lambda path: path.write_bytes(b""),
    "a text": lambda path: path.write_text("dear diary\n" * 500),
    "one byte": lambda path: path.write_bytes(b"S"),
    "random": lambda path: path.write_bytes(random.Random(SEED).randbytes(9000)),
    "a folder": lambda path: path.mkdir(),
    "a folder with a file in it": lambda path: (path.mkdir(), (path / "mine").write_text("keep"))[0],
    "another program's": lambda path: foreign(path),
    "a newer schema": lambda path: sqlite(path, "CREATE TABLE later (x); PRAGMA user_version=9"),
    "tables and no schema": lambda path: sqlite(path, "CREATE TABLE batch (x)"),
}


def sqlite(path: Path, script: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(script)


def foreign(path: Path) -> None:
    sqlite(path, "CREATE TABLE contacts (name TEXT, phone TEXT); INSERT INTO contacts VALUES ('Ada', '1815')")


@pytest.mark.parametrize("what", ODD)
async def test_whatever_lies_in_its_place_is_set_aside_untouched_and_a_spool_begun(what: str, tmp_path: Path) -> None:
    path = tmp_path / MAIN
    ODD[what](path)
    before = tree(path)
    async with spool_in(tmp_path) as spool:
        await spool.until_safe(spool.append(readings(0, 5)))
        assert own(await taken(spool)) == list(range(5))
        told = (await spool.status()).ledger
    if what != "empty":  # of which nothing could be lost
        (aside,) = tmp_path.glob("spool.damaged-*.db")
        assert tree(aside) == before
        assert told == {"damaged on the card": 1}
    async with spool_in(tmp_path) as spool:  # and once is enough
        assert own(await taken(spool)) == list(range(5))
    assert len([*tmp_path.glob("spool.damaged-*.db")]) == (what != "empty")


def tree(path: Path) -> dict[str, bytes]:
    if path.is_dir():
        return {one.name: one.read_bytes() for one in path.iterdir()}
    return {"": path.read_bytes()}


async def test_a_newer_spool_keeps_what_this_version_can_read_of_it(rested: Store, tmp_path: Path) -> None:
    rested.put(tmp_path)
    sqlite(tmp_path / MAIN, "PRAGMA user_version=3; CREATE TABLE later (x)")
    found = await look(tmp_path)
    assert judge(rested, found, most_lost=0) == []


@pytest.mark.parametrize("marker", [b"", b"\xff\x00garbage", b'{"generation":7,"file":[]}', b"[1]", None])
async def test_a_marker_that_is_garbage_costs_nothing(rested: Store, tmp_path: Path, marker: bytes | None) -> None:
    found = await opened(rested, tmp_path, marker=marker)
    assert judge(rested, found, most_lost=0) == [] and found.gaps == []


async def test_a_lock_that_a_killed_gateway_left_locks_nobody_out(rested: Store, tmp_path: Path) -> None:
    tmp_path.joinpath("spool.lock").write_text("4711")
    assert judge(rested, await opened(rested, tmp_path), most_lost=0) == []


async def test_a_folder_that_is_not_there_is_made(tmp_path: Path) -> None:
    async with spool_in(tmp_path / "a" / "b") as spool:
        await spool.until_safe(spool.append(readings(0, 2)))
    assert (tmp_path / "a" / "b" / MAIN).stat().st_mode & 0o077 == 0


# The first schema.


OLD_SCHEMA = """
CREATE TABLE batch (first INTEGER PRIMARY KEY, past INTEGER NOT NULL, crc INTEGER NOT NULL, body BLOB NOT NULL);
CREATE TABLE mark (node TEXT NOT NULL, install TEXT NOT NULL, boot INTEGER NOT NULL, upto INTEGER NOT NULL,
    beyond TEXT NOT NULL, PRIMARY KEY (node, install, boot)) WITHOUT ROWID;
CREATE TABLE route (id TEXT PRIMARY KEY, cursor INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE ledger (id INTEGER PRIMARY KEY, at_ms INTEGER NOT NULL, node TEXT NOT NULL, install TEXT NOT NULL,
    boot INTEGER NOT NULL, first INTEGER NOT NULL, last INTEGER, why TEXT NOT NULL);
CREATE TABLE manifest (hash TEXT PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE set_aside (id INTEGER PRIMARY KEY, at_ms INTEGER NOT NULL, route TEXT NOT NULL, reason TEXT NOT NULL,
    body BLOB NOT NULL);
CREATE TABLE damaged (first INTEGER PRIMARY KEY, past INTEGER NOT NULL, crc INTEGER NOT NULL, body BLOB NOT NULL);
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
PRAGMA user_version=1;
"""


def as_old(one: Reading) -> list[object]:
    return list(msgspec.to_builtins(one))[:10]


async def test_a_spool_of_the_first_schema_goes_on_with_all_that_it_held(tmp_path: Path) -> None:
    pack = msgspec.msgpack.encode
    with contextlib.closing(sqlite3.connect(tmp_path / MAIN)) as db, db:
        db.executescript(OLD_SCHEMA)
        for first in range(0, 30, 10):
            body = zlib.compress(pack([as_old(one) for one in readings(first, first + 10)]))
            broken = first == 20
            db.execute("INSERT INTO batch VALUES (?, ?, ?, ?)", (first, first + 10, zlib.crc32(body) ^ broken, body))
        db.execute("INSERT INTO mark VALUES ('n1', ?, 1, 29, '[[31,32]]')", (INSTALL,))
        db.execute("INSERT INTO route VALUES ('r', 5)")
        db.execute("INSERT INTO manifest VALUES (?, ?)", (MANIFEST.hash, pack(MANIFEST)))
        db.execute("INSERT INTO ledger VALUES (1, 1, 'n1', ?, 1, 40, 41, 'dropped by the node')", (INSTALL,))
        db.execute("INSERT INTO set_aside VALUES (1, 1, 'r', 'too large', ?)", (pack(as_old(reading(3))),))
    async with spool_in(tmp_path) as spool:
        got = await taken(spool)
        assert own(got) == list(range(5, 20))
        # What its clock was worth the first schema did not say.
        same = [msgspec.structs.replace(one, quality=0) for one in got if one.event is None]
        assert same == readings(5, 20)
        assert [one.event.why for one in got if one.event is not None][-1].startswith("damaged on the card")
        assert spool.upto(KEY) == 29
        assert spool.append([reading(29), reading(31), reading(33)]) and (await spool.status()).repeats == 2
        assert spool.manifest(MANIFEST.hash) == MANIFEST
        assert [one.reading for one in await spool.refused()] == [reading(3)]
        assert (await spool.status()).ledger["dropped by the node"] == 1
    assert [*tmp_path.glob("spool.damaged-*.db")]


# What the operating system forbids: a clear end, and nothing changed.


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB, which only root can mount."""
    assert os.geteuid() == 0, "only root can mount a small disk: run this as root, as CI does"
    disk = tmp_path / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk))
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("damaged", [False, True])
async def test_on_a_full_disk_it_starts_or_says_so_and_loses_nothing(
    killed: Store, small_disk: Path, damaged: bool
) -> None:
    killed.put(small_disk, **({"main": flipped(killed.files[MAIN], 7637, 5), "wal": None} if damaged else {}))
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    found = await look(small_disk)
    assert found.started or "the disk is full: make room on it" in found.error, found.error
    filler.unlink()
    found = await look(small_disk)
    assert judge(killed, found) == []
    if not damaged:
        assert found.gaps == []


async def test_on_a_read_only_file_system_it_says_so_and_that_the_card_may_be_worn(
    rested: Store, small_disk: Path
) -> None:
    rested.put(small_disk)
    mount("-o", "remount,ro", str(small_disk))
    found = await look(small_disk)
    assert not found.started
    assert str(small_disk) in found.error and "Read-only" in found.error and "worn card" in found.error, found.error


def run_as_nobody(folder: Path) -> tuple[int, str]:
    """Opening a spool, by another user: how it ended, and what it said."""
    code = (
        "import asyncio, os, sys\n"
        f"sys.path[:0] = {[str(REPO / 'tests'), str(REPO / 'edge')]!r}\n"
        "from pathlib import Path\n"
        "from fieldpost.errors import SpoolFault\n"
        "from spools import readings, spool_in\n"
        "import fieldpost.spool.repair, concurrent.futures.thread\n"
        "async def main():\n"
        "    spool = spool_in(Path(sys.argv[1]))\n"
        "    os.setgid(65534); os.setuid(65534)\n"
        "    async with spool:\n"
        "        pass\n"
        "try:\n"
        "    asyncio.run(main())\n"
        "except SpoolFault as fault:\n"
        "    sys.exit(str(fault))\n"
    )
    assert os.geteuid() == 0, "only root can become another user: run this as root, as CI does"
    for above in (folder, *folder.parents):
        if Path("/tmp") in above.parents:
            above.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize("what", ["the folder", "the file", "the lock"])
def test_of_another_owner_it_says_whose_it_is_and_what_to_do(rested: Store, tmp_path: Path, what: str) -> None:
    folder = tmp_path / "data"
    rested.put(folder)
    for path in (folder, *folder.iterdir()):
        os.chown(path, 65534, 65534)
    theirs = {"the folder": folder, "the file": folder / MAIN, "the lock": folder / "spool.lock"}[what]
    theirs.touch()
    theirs.chmod(0o755 if theirs is folder else 0o600)
    os.chown(theirs, 0, 0)
    before = (folder / MAIN).read_bytes()
    code, said = run_as_nobody(folder)
    assert code == 1 and "Traceback" not in said and len(said.splitlines()) == 1, said
    assert str(folder) in said and "chown" in said, said
    assert (folder / MAIN).read_bytes() == before and not [*folder.glob("spool.damaged-*")]


async def test_the_gateway_itself_starts_on_a_damaged_file(rested: Store, make_gateway: Callable[..., Gateway]) -> None:
    gateway = make_gateway()
    gateway.data.mkdir()
    rested.put(gateway.data, main=b"no database at all\n" * 400)
    gateway.start()
    assert gateway.status()["spool"]["ledger"] == {"damaged on the card": 1}
    assert "set aside as spool.damaged-" in gateway.log() and "Traceback" not in gateway.log()
    gateway.stop()
    rested.put(gateway.data, main=flipped(rested.files[MAIN], 7637, 5))
    gateway.start()
    assert gateway.status()["spool"]["stored"] >= len(rested.stored)


# While it runs.


@pytest.mark.parametrize("page", [3, 4, 12, 20])
async def test_damage_that_comes_while_it_runs_is_survived(rested: Store, tmp_path: Path, page: int) -> None:
    rested.put(tmp_path)

    def strike(spool: object) -> None:
        with (tmp_path / MAIN).open("r+b", buffering=0) as file:
            file.seek((page - 1) * PAGE_BYTES)
            file.write(bytes(PAGE_BYTES))

    found = await look(tmp_path, strike)
    assert judge(rested, found) == []
    assert len(found.delivered["a"]) > 40


async def opened(store: Store, folder: Path, **changed: bytes | None) -> Found:
    store.put(folder, **changed)
    return await look(folder)


async def test_the_ledger_names_the_rows_whose_bytes_are_lost(rested: Store, tmp_path: Path) -> None:
    total = 0
    for at in random.Random(SEED).sample(range(19 * PAGE_BYTES + 8, 21 * PAGE_BYTES), 5):  # in the large body
        folder = tmp_path / f"{at}"
        found = await opened(rested, folder, main=flipped(rested.files[MAIN], at, 2))
        assert judge(rested, found, most_lost=600) == [] and unnamed(rested, found) == []
        total += any((gap.node, gap.first, gap.last) == ("n2", 0, 599) for gap in found.gaps)
    assert total >= 4


async def test_a_row_that_claims_the_place_of_another_costs_only_itself(rested: Store, tmp_path: Path) -> None:
    # Its number is in the tree's cell, so two rows can have the same one; the first was once handed out for the second.
    total = 0
    for at, cell in enumerate(cells(rested.files[MAIN])):
        for bit in range(3):
            found = await opened(rested, tmp_path / f"{at}-{bit}", main=flipped(rested.files[MAIN], cell, bit))
            assert judge(rested, found, most_lost=2) == [], (cell, bit)
            total += len(found.delivered["a"]) < len(rested.outstanding["a"])
    assert total > 10


def cells(main: bytes) -> list[int]:
    """Where the last byte of the place of some rows of the bulk lane lies: a number of nine bytes, then the header."""
    found = [match.end() for match in re.finditer(rb"\x80\xc0\x80\x80\x80\x80\x80\x80", main)]
    return [at for at in found if main[at + 1] in range(11, 16) and main[at + 2] == 0][:12]
