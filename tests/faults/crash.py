"""Every point at which the power can go: the true trace of the spool's calls, and at each what a cut may leave.

python -m tests.faults.crash [--seed N] [--points N]    writes CRASH.md: 10 to 15 minutes
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from sqlite3 import sqlite_version

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent / "edge")]

from faults.oracle import History, View, look, owed, put, withheld  # noqa: E402
from faults.recording import Call, Disk, Event, How, Image, read_trace  # noqa: E402
from faults.workload import Outcome, Run, Workload  # noqa: E402

SUBSETS = 3
"""Random subsets of what is pending, at each point."""

AGAIN_EVERY = 5
"""Of so many images one is opened twice, and once more by a whole `Spool`."""


@dataclass
class Tally:
    """What was enumerated. `faults`: each with the way to have it again."""

    points: int = 0
    images: int = 0
    opened: int = 0
    again: int = 0
    runs: int = 0
    calls: int = 0
    injected: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Both together."""
        for name in ("points", "images", "opened", "again", "runs", "calls"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.injected += other.injected
        self.kinds += other.kinds
        self.faults += other.faults


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """An empty folder, in memory where there is such a place: what is durable is worked out, not tried."""
    shm = Path("/dev/shm")
    where = shm if os.access(shm, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="fieldpost-crash-", dir=where))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


FALSE_ALARM = "has lost its write-ahead log, which was there when it was last used"
"""What a spool may say after a cut where the order of two names was not to be had, since the disk did not delete the
one or sync their folder: it sets its file aside, and takes everything over."""


def _leaves_names_in_disorder(before: Event, event: Event) -> bool:
    if event.call is Call.OPEN:
        return event.failed and event.path == "spool"
    if event.call is Call.UNLINK:
        return event.failed and event.path == "spool/spool.open"
    return event.call is Call.FSYNC and event.failed and before.call is Call.OPEN and before.fd == event.fd


class Judge:
    """Opens images, each different one once, and holds them against the history."""

    def __init__(self, folder: Path, tally: Tally, seed: int) -> None:
        self._folder = folder / "image"
        self._tally = tally
        self._views: dict[bytes, View] = {}
        self._chance = random.Random(seed)

    def judge(self, events: Sequence[Event], what: str, points: Sequence[int] | None = None) -> None:
        """Cut the power behind each event (or behind those at `points` only), and see what is owed."""
        disk, history = Disk(), History()
        false_alarm = FALSE_ALARM if any(_leaves_names_in_disorder(*pair) for pair in pairwise(events)) else None
        wanted = set(range(len(events)) if points is None else points)
        for number, event in enumerate(events):
            disk.feed(event)
            if event.call is Call.MARK:
                history.hear(event.said)
            if number not in wanted or event.call is Call.CLOSE:
                continue
            self._tally.points += 1
            for image in disk.images(self._chance, SUBSETS):
                self._tally.images += 1
                self._tally.kinds[image.how] += 1
                faults = [f for f in owed(history, self._view(image)) if not (false_alarm and false_alarm in f)]
                if faults:
                    shown = "; ".join(faults[:3])
                    self._tally.faults.append(
                        f"{what}, behind event {number} ({event.call.name}), {image.how}: {shown}"
                    )

    def _view(self, image: Image) -> View:
        made = blake2b()
        for name, content in sorted(image.files.items()):
            made.update(f"{name}\n{-1 if content is None else len(content)}\n".encode() + (content or b""))
        digest = made.digest()
        view = self._views.get(digest)
        if view is None:
            if len(self._views) > 3000:
                self._views.clear()
            view = self._views[digest] = self._open(image)
        return view

    def _open(self, image: Image) -> View:
        self._tally.opened += 1
        folder = put(image, self._folder)
        try:
            view = look(folder)
            if self._tally.opened % AGAIN_EVERY == 0:
                self._tally.again += 1
                again = look(folder)
                view.faults += again.faults
                if again.said != view.said:
                    view.faults.append("not the same when it is opened again")
                view.faults += asyncio.run(withheld(folder, view))
        except Exception as error:
            return View(faults=[f"does not open: {error!r}"])
        return view


def live(workload: Workload, folder: Path, run: Run) -> tuple[Outcome, list[Event]]:
    """One run, in a folder that is empty before."""
    shutil.rmtree(run.root, ignore_errors=True)
    Path(run.root).mkdir(parents=True)
    outcome = workload.run(run)
    return outcome, read_trace(Path(run.trace))


def a_run(folder: Path, seed: int, **more: object) -> Run:
    return Run(str(folder / "root"), str(folder / "trace"), seed, **more)  # type: ignore[arg-type]


def crash_points(seed: int, tally: Tally, *, lives: int = 4, steps: int = 30, points: int = 0) -> None:
    """Every point of one seed's run, or `points` of them by chance."""
    with scratch() as folder, Workload() as workload:
        outcome, events = live(workload, folder, a_run(folder, seed, lives=lives, steps=steps))
        tally.runs += 1
        tally.calls += outcome.calls
        if outcome.error:
            tally.faults.append(f"seed {seed}: {outcome.error}")
        chosen = random.Random(seed).sample(range(len(events)), min(points, len(events))) if points else None
        Judge(folder, tally, seed).judge(events, f"seed {seed}, lives {lives}, steps {steps}", chosen)


LIVES, STEPS = 2, 6
"""A run in which each call is made to fail is short, for there are thousands of them."""

POINTS_BEHIND = 2
"""Points by chance behind a failure at which the power is cut too; it is at the failure, behind acks and at the end."""

WAYS: dict[Call, tuple[tuple[str, How, int], ...]] = {
    Call.WRITE: (
        ("EIO", How.EIO, 1),
        ("EIO for 40 calls", How.EIO, 40),
        ("ENOSPC", How.ENOSPC, 1),
        ("ENOSPC for 40 calls", How.ENOSPC, 40),
        ("short", How.SHORT, 1),
        ("short, then ENOSPC", How.SHORT_THEN_ENOSPC, 2),
    ),
    Call.FSYNC: (("EIO", How.EIO, 1), ("EIO twice", How.EIO, 2), ("EIO for 5 calls", How.EIO, 5)),
    Call.OPEN: (("EIO", How.EIO, 1), ("ENOSPC", How.ENOSPC, 1), ("EIO for 5 calls", How.EIO, 5)),
    Call.TRUNCATE: (("EIO", How.EIO, 1), ("EIO for 5 calls", How.EIO, 5)),
    Call.RENAME: (("EIO", How.EIO, 1), ("ENOSPC", How.ENOSPC, 1)),
    Call.UNLINK: (("EIO", How.EIO, 1),),
    Call.MKDIR: (("EIO", How.EIO, 1), ("ENOSPC", How.ENOSPC, 1)),
}
"""How a call of each kind is made to fail: in which words, how, and how often in a row. All of them by a kill too."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Call number `k` of a run, of kind `call`, fails (or the process is killed there)."""

    seed: int
    k: int
    call: Call
    word: str

    @property
    def fault(self) -> tuple[int, int, int, int]:
        if self.word == "kill":
            return (self.k, 1, -1, How.KILL.value)
        ((how, times),) = ((how, times) for word, how, times in WAYS[self.call] if word == self.word)
        return (self.k, times, self.call.value, how.value)

    def __str__(self) -> str:
        return f"seed {self.seed}, call {self.k} ({self.call.name}) {self.word}"


def failures(events: Sequence[Event], seed: int) -> list[Failure]:
    """Every way in which each call of a run can fail."""
    return [
        Failure(seed, event.number, event.call, word)
        for event in events
        if event.number
        for word in [*(word for word, _, _ in WAYS.get(event.call, ())), "kill"]
    ]


def fail(workload: Workload, folder: Path, failure: Failure, tally: Tally) -> None:
    """One run with one failure: it goes on, acknowledges nothing that is not kept, and a power cut later finds all."""
    run = a_run(folder, failure.seed, lives=LIVES, steps=STEPS, fault=failure.fault)
    outcome, events = live(workload, folder, run)
    tally.runs += 1
    tally.calls += outcome.calls
    tally.injected[f"{failure.call.name.lower()}: {failure.word}"] += 1
    if outcome.error:
        tally.faults.append(f"{failure}: {outcome.error[-2000:]}")
    first = next((n for n, event in enumerate(events) if event.number >= failure.k), len(events) - 1)
    behind = range(first, len(events))
    acks = [n for n in behind if events[n].call is Call.MARK and "ack" in events[n].said]
    chance = random.Random(f"{failure}")
    points = {first, behind[-1], *acks[:1], *chance.sample(acks, min(1, len(acks)))}
    points |= set(chance.sample(behind, min(POINTS_BEHIND, len(behind))))
    Judge(folder, tally, failure.seed).judge(events, str(failure), sorted(points))


def every_failure(seed: int, tally: Tally, *, sample: int = 0, share: tuple[int, int] = (0, 1)) -> None:
    """Each call of a run fails in each way, or `sample` of them by chance; `share`: part n of so many of the work."""
    with scratch() as folder, Workload() as workload:
        outcome, events = live(workload, folder, a_run(folder, seed, lives=LIVES, steps=STEPS))
        assert not outcome.error, outcome.error
        wanted = failures(events, seed)
        chosen = random.Random(seed).sample(wanted, sample) if sample else wanted
        for failure in chosen[share[0] :: share[1]]:
            fail(workload, folder, failure, tally)


# Everything, for `make prove`.

CRASH_SEEDS, FAILURE_SEEDS, SHARES = 12, 1, 8


def _points_of(seed: int, points: int) -> Tally:
    tally = Tally()
    crash_points(seed, tally, points=points)
    return tally


def _failures_of(seed: int, part: int) -> Tally:
    tally = Tally()
    every_failure(seed, tally, share=(part, SHARES))
    return tally


def prove(seed: int, points: int) -> tuple[Tally, Tally, float]:
    """(points at which the power is cut, calls that fail, seconds): all of them, or `points` of each seed's."""
    started = time.monotonic()
    cuts, failed = Tally(), Tally()
    # Each in a process of its own, begun afresh: the workload forks, and no thread may be on its way there.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn"), initializer=_quiet) as pool:
        parts = [(n, part) for n in range(FAILURE_SEEDS) for part in range(SHARES)]
        failing = [pool.submit(_failures_of, seed + n, part) for n, part in parts]
        cutting = [pool.submit(_points_of, seed + n, points) for n in range(CRASH_SEEDS)]
        for tally, futures in ((failed, failing), (cuts, cutting)):
            for future in as_completed(futures):
                tally.add(future.result())
                print(f"{cuts.points + failed.points} points, {failed.runs} failures", file=sys.stderr, flush=True)
    return cuts, failed, time.monotonic() - started


def _quiet() -> None:
    logging.disable(logging.CRITICAL)  # thousands of spools tell what they find after a cut


def report(seed: int, points: int, cuts: Tally, failed: Tally, took_s: float) -> str:
    """CRASH.md."""
    lines = [
        "# Crash points, and the failure of every call",
        "",
        f"`python -m tests.faults.crash --seed {seed}{f' --points {points}' if points else ''}`, "
        f"{time.strftime('%Y-%m-%d', time.gmtime())}, {platform.machine()}, {os.cpu_count()} cores, "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}, SQLite {sqlite_version}; "
        f"{took_s / 60:.0f} minutes.",
        "",
        "The real spool runs under `recorder.c`, which writes down each call that changes a file, a name or what is",
        "durable. Behind each call, and behind each ack and confirmation, the power is cut: what was not synced is",
        "there or not, each write for itself, torn, or in another order, and so is each name whose folder was not",
        "synced. Each disk that this can leave is opened again with the real spool and held against what had been",
        "promised.",
        "",
        "| The power is cut | |",
        "|---|---|",
        f"| runs (four lives of a spool, most of them killed), calls in them | {cuts.runs}, {cuts.calls} |",
        f"| points | {cuts.points:,} |",
        f"| disks that a cut can leave there | {cuts.images:,} |",
        f"| different ones, each opened | {cuts.opened:,} |",
        f"| of these opened again, and drained by a whole `Spool` | {cuts.again:,} |",
        *(f"| disks: {how} | {count:,} |" for how, count in sorted(cuts.kinds.items())),
        f"| **faults found** | **{len(cuts.faults)}** |",
        "",
        "| A call fails | runs |",
        "|---|---|",
        *(f"| {word} | {count} |" for word, count in sorted(failed.injected.items())),
        f"| all | {failed.runs:,} |",
        f"| points behind the failures at which the power is cut as well | {failed.points:,} |",
        f"| disks that a cut can leave there; different ones, opened | {failed.images:,}; {failed.opened:,} |",
        f"| **faults found** | **{len(failed.faults)}** |",
        "",
    ]
    faults = cuts.faults + failed.faults
    if faults:
        lines += ["## Faults", "", *(f"- {fault[:600]}" for fault in faults[:100]), ""]
    return "\n".join(lines)


def main() -> int:
    arguments = argparse.ArgumentParser(prog="python -m tests.faults.crash", description=__doc__)
    arguments.add_argument("--seed", type=int, default=random.SystemRandom().randrange(100_000))
    arguments.add_argument("--points", type=int, default=0, help="points of each seed's run; 0: all")
    chosen = arguments.parse_args()
    cuts, failed, took_s = prove(chosen.seed, chosen.points)
    text = report(chosen.seed, chosen.points, cuts, failed, took_s)
    (HERE / "CRASH.md").write_text(text)
    print(text)
    return 1 if cuts.faults or failed.faults else 0


if __name__ == "__main__":
    # Under its own name, so that a pool's processes find what they are to call.
    from faults import crash

    sys.exit(crash.main())
