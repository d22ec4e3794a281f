"""A spool filled and emptied in process, without gateway and brokers: what the spool itself can do.

    python -m tests.bench.hoard fill FOLDER COUNT     until COUNT readings are in it
    python -m tests.bench.hoard take FOLDER COUNT     so many of the oldest, as history for the route `all`

Each says what it saw as one JSON object, and ends: so the memory that it tells of is that of this spool alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fieldpost.reading import Manifest, Reading
from fieldpost.spool import RouteTerms, Spool, SpoolSettings, Terms
from fieldpost.wire import parse_manifest

from .load import CLIMATE, Walk, manifest
from .meters import rss_mb

NODES = 10
ROUTE = "all"
CHUNK = 10_000
INSTALL = "a1b2c3d4e5f6"
CLIMATES: Manifest = parse_manifest(manifest(*CLIMATE))


@dataclass(frozen=True, slots=True)
class Seen:
    """`rate` of the last CHUNKs; `open_s`: until a spool with all of it was open; `peak_mb` of the process."""

    readings: int
    rate: float
    open_s: float
    rss_mb: float
    peak_mb: float


def readings(first: int, past: int, now_ms: int) -> Iterator[Reading]:
    """Ten nodes in turn, a reading a second each, give or take what a busy board is late.

    The same again after a thousand rows of a node: batches are compressed one by one, so that makes none smaller.
    """
    for n in range(first, past):
        node, seq = n % NODES, n // NODES
        late_ms, values = _WALKS[node][seq % 1000]
        at = seq * 1000 + late_ms
        yield Reading(f"node-{node}", INSTALL, 1, seq, at, now_ms + at, 50, CLIMATES.hash, values)


def _walk(node: int) -> list[tuple[int, tuple[int, ...]]]:
    walk, late = Walk(node), random.Random(node)
    return [(late.randint(0, 20), walk.next()) for _ in range(1000)]


_WALKS = [_walk(node) for node in range(NODES)]


def spool_in(folder: Path) -> Spool:
    """A spool as the gateway has it, with the one route `all`, whose uplink is down."""
    settings = SpoolSettings(folder, Terms(), max_bytes=10**11, min_free_bytes=0, trust_card=True)
    return Spool(settings, [RouteTerms(ROUTE)])


async def fill(folder: Path, count: int) -> Seen:
    """Append until `count` readings are in it; the rate is that of the last ones."""
    now_ms = time.time_ns() // 1_000_000
    rates: list[float] = []
    async with spool_in(folder) as spool:
        spool.keep_manifest(CLIMATES)
        at = (spool.upto(("node-0", INSTALL, 1)) + 1) * NODES
        while at < count:
            chunk = list(readings(at, min(at + CHUNK, count), now_ms))
            began = time.perf_counter()
            ticket = spool.append(chunk)
            spool.hurry()
            await spool.until_safe(ticket)
            rates.append(len(chunk) / (time.perf_counter() - began))
            at += len(chunk)
    return Seen(count, _typical(rates), *await _opened(folder))


async def take(folder: Path, count: int) -> Seen:
    """Take and confirm the oldest `count` readings as a route with a window of 8 does; leaves it at that."""
    rates: list[float] = []
    async with spool_in(folder) as spool:
        spool.link(ROUTE, up=True, durable=True)
        done = 0
        while done < count:
            began, before = time.perf_counter(), done
            while done < min(count, before + CHUNK):
                batch = await spool.take(ROUTE, "backfill", 500)
                batch = batch or await spool.take(ROUTE, "live", 500)
                if batch is None:
                    break
                spool.confirm(ROUTE, batch)
                done += len(batch.readings)
            if done == before:
                break
            rates.append((done - before) / (time.perf_counter() - began))
    return Seen(done, _typical(rates), 0.0, rss_mb(os.getpid()), rss_mb(os.getpid(), peak=True))


async def _opened(folder: Path) -> tuple[float, float, float]:
    """How long it takes to open, and the memory then."""
    began = time.perf_counter()
    async with spool_in(folder):
        took = time.perf_counter() - began
        return took, rss_mb(os.getpid()), rss_mb(os.getpid(), peak=True)


def _typical(rates: list[float]) -> float:
    """The median of the last 20: a neighbour's burst on the disk is not the spool's."""
    last = sorted(rates[-20:])
    return last[len(last) // 2] if last else 0.0


async def in_process(do: str, folder: Path, count: int) -> Seen:
    """One of them in a process of its own."""
    root = Path(__file__).parent.parent.parent
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.bench.hoard", do, str(folder), str(count)),
        cwd=root,
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"hoard {do} {count}: exit code {process.returncode}")
    return Seen(**json.loads(out))


if __name__ == "__main__":
    do, folder, count = {"fill": fill, "take": take}[sys.argv[1]], Path(sys.argv[2]), int(sys.argv[3])
    seen = asyncio.run(do(folder, count))
    print(json.dumps({name: getattr(seen, name) for name in Seen.__dataclass_fields__}))
