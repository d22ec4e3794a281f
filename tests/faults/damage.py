"""A spool that holds one of everything, its file damaged in every way, and what became of its readings.

python -m tests.faults.damage      every bit-flip and every length, minutes; writes DAMAGE.md
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import platform
import shutil
import sqlite3
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]

import msgspec  # noqa: E402
from fieldpost.errors import SpoolFault  # noqa: E402
from fieldpost.reading import GATEWAY, Event, Reading  # noqa: E402
from fieldpost.spool import LaneName, Spool  # noqa: E402
from fieldpost.spool.folder import born  # noqa: E402
from fieldpost.spool.marks import Key  # noqa: E402
from fieldpost.spool.rows import ids_of  # noqa: E402
from spools import INSTALL, MANIFEST, HandClock, confirm_all, crash, reading, readings, spool_in, taken  # noqa: E402

ROUTES = ("a", "b")
MAIN, WAL, MARKER = "spool.db", "spool.db-wal", "spool.id"
N1, N2 = ("n1", INSTALL, 1), ("n2", INSTALL, 1)
ON_THE_CARD = "damaged on the card"


@dataclass
class Store:
    """The files of a spool whose machine lost its power, and what they hold."""

    files: dict[str, bytes]
    outstanding: dict[str, dict[str, Reading]]
    stored: dict[str, Reading]
    refused: dict[str, Reading]
    upto: dict[Key, int]

    def put(self, folder: Path, **changed: bytes | None) -> None:
        """Lay the files down as if they had never been copied; `main`, `wal`, `marker` in place of ours."""
        folder.mkdir(parents=True, exist_ok=True)
        names = {"main": MAIN, "wal": WAL, "marker": MARKER}
        files: dict[str, bytes | None] = self.files | {names[name]: content for name, content in changed.items()}
        for name, content in files.items():
            if content is not None:
                (folder / name).write_bytes(content)
        if "marker" not in changed:
            said = msgspec.json.decode(self.files[MARKER])
            there = {"file": born(folder / MAIN)} if (folder / MAIN).exists() else {}
            (folder / MARKER).write_bytes(msgspec.json.encode(said | there))


async def build(folder: Path) -> Store:
    """Acknowledged, undelivered, delivered and kept, urgent, thinned and set-aside readings, in file and log."""
    spool = await spool_in(
        folder, *ROUTES, clock=HandClock(), linger_ms=3_600_000, event_linger_ms=3_600_000
    ).__aenter__()
    spool.keep_manifest(MANIFEST)

    async def write(first: int, past: int, node: str = "n1", urgent: set[int] | None = None) -> None:
        spool.append(readings(first, past, node=node), urgent or set())
        await spool._commit()

    await write(0, 20)
    for route in ROUTES:
        await confirm_all(spool, route)
    await write(20, 40)
    for info in await spool._card.run(spool._card.log.infos, LaneName.BULK, 20, limit=1):
        piece = await spool._card.run(spool._card.log.read, info.lane, info.first, info.past, info.count)
        spool.queue.thin(info, piece.readings)
    await write(40, 60, urgent={45, 46})
    await spool._card.run(lambda: spool._card.log._opened().execute("PRAGMA wal_checkpoint").fetchall())
    await write(0, 20, "n2")
    batch = await spool.take("b", "live", 5)
    assert batch is not None
    spool.confirm("b", batch)
    spool.set_aside("a", readings(10, 11)[0], "too large for the far side")
    await write(60, 80, urgent={61})
    await write(20, 40, "n2")
    files = {name: (folder / name).read_bytes() for name in (MAIN, WAL, MARKER)}
    await crash(spool)
    store = Store(files, {}, {}, {}, {})
    store.put(folder.with_name("whole"))
    found = await look(folder.with_name("whole"))
    assert found.started and not found.gaps and len(found.refused) == 1
    return Store(files, found.delivered, found.stored, found.refused, found.upto)


async def build_rested(folder: Path) -> Store:
    """A spool that was stopped as it should be: one file, whose table of batches is a tree with chains of pages."""
    async with spool_in(folder, *ROUTES, clock=HandClock(), linger_ms=3_600_000, event_linger_ms=3_600_000) as spool:
        spool.keep_manifest(MANIFEST)
        for first in range(0, 80, 2):
            spool.append(readings(first, first + 2), {first} if first % 8 == 0 else set())
            await spool._commit()
        spool.append([reading(seq, node="n2", values=(zlib.crc32(b"%d" % seq),)) for seq in range(600)])
        await spool._commit()
        batch = await spool.take("b", "live", 7)
        assert batch is not None
        spool.confirm("b", batch)
        spool.set_aside("a", reading(10), "too large for the far side")
    store = Store({name: (folder / name).read_bytes() for name in (MAIN, MARKER)}, {}, {}, {}, {})
    store.put(folder.with_name("whole-rested"))
    found = await look(folder.with_name("whole-rested"))
    assert found.started and not found.gaps and len(found.refused) == 1
    return Store(store.files, found.delivered, found.stored, found.refused, found.upto)


@dataclass
class Found:
    """What a spool had after it was opened on damaged files."""

    started: bool = False
    error: str = ""
    delivered: dict[str, dict[str, Reading]] = field(default_factory=dict)
    doubled: list[str] = field(default_factory=list)
    stored: dict[str, Reading] = field(default_factory=dict)
    refused: dict[str, Reading] = field(default_factory=dict)
    upto: dict[Key, int] = field(default_factory=dict)
    gaps: list[Event] = field(default_factory=list)
    ledger: dict[str, int] = field(default_factory=dict)
    fresh: bool = False


async def look(folder: Path, damage: Callable[[Spool], None] = lambda spool: None) -> Found:
    """Open, damage what is open, take all for each route, read all that is stored, and take something new."""
    found = Found()
    try:
        async with spool_in(
            folder, *ROUTES, clock=HandClock(), linger_ms=3_600_000, event_linger_ms=3_600_000
        ) as spool:
            found.started = True
            found.upto = dict(spool.known())
            damage(spool)
            for route in ROUTES:
                got = await taken(spool, route)
                found.delivered[route] = {one.id: one for one in got}
                found.doubled += [id_ for id_, n in Counter(one.id for one in got).items() if n > 1]
            for lane in LaneName:
                at: int | None = 0
                while at is not None:
                    page, at = await spool.page(lane, at, 1000)
                    found.stored |= {one.id: one for one in page}
            found.refused = {one.reading.id: one.reading for one in await spool.refused()}
            found.gaps = [
                one.event
                for route in ROUTES
                for one in await taken(spool, route)
                if one.event is not None and one.event.why.startswith(ON_THE_CARD)
            ]
            found.ledger = (await spool.status()).ledger
            spool.append(readings(80, 81))
            found.fresh = all([any(one.seq == 80 for one in await taken(spool, route)) for route in ROUTES])
    except SpoolFault as fault:
        found.error = str(fault)
    return found


def judge(store: Store, found: Found, *, most_lost: int | None = None) -> list[str]:
    """What is wrong with that, in words. `most_lost`: readings that one damage may cost, those of one batch."""
    if not found.started or found.error:
        return [f"did not start or did not go on: {found.error}"]
    faults = []
    lost: dict[str, Reading] = {}
    for route in ROUTES:
        faults += _unequal(f"route {route}", store.outstanding[route] | store.stored, found.delivered[route])
        lost |= {id_: one for id_, one in store.outstanding[route].items() if id_ not in found.delivered[route]}
    faults += _unequal("stored", store.stored, found.stored)
    faults += _unequal("set aside", store.refused, found.refused)
    lost_kept = {id_: one for id_, one in store.stored.items() if id_ not in found.stored}
    if found.doubled:
        faults.append(f"delivered twice: {found.doubled[:3]}")
    if lost and not found.ledger.get(ON_THE_CARD):
        faults.append(f"{len(lost)} lost, and the ledger does not say so")
    if lost and not found.gaps:
        faults.append(f"{len(lost)} lost, and no gap record says so")
    if most_lost is not None and len(lost | lost_kept) > most_lost:
        faults.append(f"{len(lost | lost_kept)} lost by one damage")
    if not found.fresh:
        faults.append("a new reading is not taken and delivered")
    for key, upto in found.upto.items():
        if upto > store.upto.get(key, -1):
            faults.append(f"the mark of {key} is at {upto}, ahead of {store.upto.get(key)}")
    return faults


def _unequal(where: str, meant: dict[str, Reading], got: dict[str, Reading]) -> list[str]:
    wrong = [
        id_
        for id_, one in got.items()
        if one != meant.get(id_) and not (one.node == GATEWAY and id_ not in meant)  # what it reports now
    ]
    return [f"{where}: {len(wrong)} wrong, {wrong[0]}: {got[wrong[0]]}"] if wrong else []


def unnamed(store: Store, found: Found) -> list[str]:
    """The lost readings that no gap record names."""
    named = {
        (gap.node, gap.install, gap.boot, seq)
        for gap in found.gaps
        if gap.node != GATEWAY or gap.last is not None
        for seq in range(gap.first, (gap.last if gap.last is not None else gap.first) + 1)
    }
    missing = []
    for route in ROUTES:
        for id_, one in store.outstanding[route].items():
            if id_ not in found.delivered.get(route, {}):
                rows = [(n, i, b, seq) for n, i, b, first, last in ids_of([one]) for seq in range(first, last + 1)]
                missing += [id_] if not set(rows) <= named else []
    return missing


def nothing_deleted(folder: Path, before: Mapping[str, bytes | None]) -> list[str]:
    """Where the spool has begun a new file, the old one is beside it, no shorter than it was."""
    if not any(folder.glob("spool.damaged-*")):
        return []
    sizes = [path.stat().st_size for path in folder.glob("spool.damaged-*.db")]
    logs = [path.read_bytes() for path in folder.glob("spool.damaged-*-wal")]
    main, wal = before.get(MAIN) or b"", before.get(WAL) or b""
    if sizes:
        return [] if any(size >= len(main) for size in sizes) else [f"{MAIN} of {len(main)} bytes: {sizes} are left"]
    return [] if wal in logs else [f"{WAL} is not among what was set aside"]


def flipped(content: bytes, at: int, bit: int) -> bytes:
    """`content` with one bit of the byte `at` turned over."""
    changed = bytearray(content)
    changed[at] ^= 1 << bit
    return bytes(changed)


@dataclass(frozen=True)
class Damage:
    """One damage to one of the two files."""

    name: str
    which: str
    apply: Callable[[bytes], bytes]


def flips(store: Store, bit: Callable[[int], int]) -> Iterator[Damage]:
    """One flipped bit at every byte."""
    for which, name in (("main", MAIN), ("wal", WAL)):
        for at in range(len(store.files.get(name, b""))):
            yield Damage(f"{which} byte {at} bit {bit(at)}", which, lambda c, at=at: flipped(c, at, bit(at)))


def cuts(store: Store) -> Iterator[Damage]:
    """Truncation at every length."""
    for which, name in (("main", MAIN), ("wal", WAL)):
        for at in range(len(store.files.get(name, b""))):
            yield Damage(f"{which} cut at {at}", which, lambda c, at=at: c[:at])


async def attempt(store: Store, damage: Damage, folder: Path, *, most_lost: int | None) -> tuple[Found, list[str]]:
    """Damage the store in `folder`, look, judge, and clean up."""
    name = MAIN if damage.which == "main" else WAL
    content = damage.apply(store.files[name])
    store.put(folder, **{damage.which: content})
    try:
        try:
            found = await look(folder)
        except Exception as error:  # a bug: it would end the gateway, and again at each start
            found = Found(error=repr(error))
        faults = judge(store, found, most_lost=most_lost)
        faults += nothing_deleted(folder, store.files | {name: content})
    finally:
        shutil.rmtree(folder)
    return found, [f"{damage.name}: {fault}" for fault in faults]


def is_silent(damage: Damage) -> bool:
    """A log that ends too early looks like one whose power went: what is behind the cut is taken back, marks as well,
    without a word. (That it is gone altogether is noticed.)"""
    return damage.which == "wal" and " cut " in damage.name


async def sample(store: Store, damages: Iterable[Damage], folder: Path, *, most_lost: int | None) -> Sum:
    """What became of each of these."""
    total = Sum()
    for number, damage in enumerate(damages):
        found, wrong = await attempt(store, damage, folder / f"{number}", most_lost=most_lost)
        if is_silent(damage):
            wrong = [one for one in wrong if " lost, and " not in one]
        total.count += 1
        total.faults += wrong
        for one in wrong:
            print(one, file=sys.stderr, flush=True)
        gone = {
            id_ for route in ROUTES for id_ in store.outstanding[route] if id_ not in found.delivered.get(route, {})
        }
        total.lossless += not gone
        total.lost = max(total.lost, len(gone))
        total.unnamed += bool(unnamed(store, found)) and not is_silent(damage)
    return total


@dataclass
class Sum:
    """`lossless` of `count` damages cost nothing, the worst `lost` so many; `unnamed`: not each row's name survived."""

    count: int = 0
    lossless: int = 0
    lost: int = 0
    unnamed: int = 0
    faults: list[str] = field(default_factory=list)


async def main() -> int:
    """Every flip and every cut of both stores, in as many processes as there are cores; writes DAMAGE.md."""
    began = time.monotonic()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        jobs = [(kind, which, part) for kind in STORES for which in ("flips", "cuts") for part in range(PARTS)]
        found = list(pool.map(_share, jobs))
    rows = []
    for kind in STORES:
        for which in ("flips", "cuts"):
            sums = [total for (k, w, _), total in zip(jobs, found, strict=True) if (k, w) == (kind, which)]
            count = sum(total.count for total in sums)
            rows.append(
                f"| {STORES[kind][0]} | {'a flipped bit at every byte' if which == 'flips' else 'cut at every length'} "
                f"| {count} | {sum(total.lossless for total in sums)} | {max(total.lost for total in sums)} "
                f"| {sum(total.unnamed for total in sums)} | **{sum(len(total.faults) for total in sums)}** |"
            )
    faults = [fault for total in found for fault in total.faults]
    text = "\n".join(
        [
            "# Damage",
            "",
            f"{time.strftime('%Y-%m-%d %H:%M')}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, "
            f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}.",
            f"Written by `make prove` (`python -m tests.faults.damage`) in {time.monotonic() - began:.0f} s.",
            "",
            "A spool with acknowledged, undelivered, delivered and kept, urgent, thinned and set-aside readings is",
            "damaged, opened, and everything taken from it. A failure: it does not start; a value is not what was",
            "written; more is lost than the one batch that the bit was in; something is lost without a word in the",
            "ledger and upstream; a file is gone; a mark is ahead of the rows; a new reading is not taken.",
            "",
            "| store | damage | tried | cost nothing | worst: readings lost | loss not named row by row | failures |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            "A log that is cut short is what a power cut leaves: what is behind the cut goes without a word, and the",
            "marks go back with it. Of a flipped bit in the log nothing is lost but what its own row costs.",
            "",
            *(f"- {fault}" for fault in faults[:50]),
        ]
    )
    (HERE / "DAMAGE.md").write_text(text.rstrip() + "\n")
    print(text)
    return 1 if faults else 0


STORES = {
    "killed": ("killed, file and log", build, 20),
    "rested": ("stopped, one file", build_rested, 600),
}
"""What it is, how it is made, and the readings of its largest batch."""

PARTS = 8


def _share(job: tuple[str, str, int]) -> Sum:
    """Every PARTS-th damage of one kind."""
    kind, which, part = job
    logging.disable(logging.CRITICAL)
    _, make, batch = STORES[kind]

    async def work(folder: Path) -> Sum:
        store = await make(folder / "built")
        damages = flips(store, lambda at: at * 5 % 8) if which == "flips" else cuts(store)
        most = batch if which == "flips" else None
        return await sample(store, islice(damages, part, None, PARTS), folder / "tried", most_lost=most)

    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        return asyncio.run(work(Path(name)))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sys.exit(asyncio.run(main()))
