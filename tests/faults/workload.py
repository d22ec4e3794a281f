"""What a spool lives through while its calls are recorded: nodes, outages, confirmations, kills, limits; by seed.

`python workload.py` is a server under recorder.so: a line with a `Run` on stdin, a line with its `Outcome` on stdout.
Each life of the spool is a process of its own, so that a kill is one; what the nodes know is outside of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import json
import logging
import os
import random
import secrets
import signal
import subprocess
import sys
import traceback
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import fieldpost.spool
from fieldpost.errors import SpoolFault
from fieldpost.reading import Event, Reading
from fieldpost.spool import Batch, LaneName, Limits, RouteTerms, Spool, SpoolSettings, Terms, Ticket
from fieldpost.spool.folder import born
from spools import INSTALL, MANIFEST, HandClock, reading

from faults.recording import How, recorder

ROUTES = ("a", "b")
ROW_EVERY_MS = 20_000
CHECKPOINT_PAGES = 40
PATIENCE = 20_000
"""How often a spool is looked at, a fifth of a millisecond apart, before it counts as stuck."""

Id = tuple[str, str, int, int]


@dataclass(frozen=True, slots=True)
class Run:
    """One run below the folder `root`, whose name is just that.

    `fault`: (number of the first call that fails, how often, of which kind, how).
    """

    root: str
    trace: str
    seed: int
    lives: int = 4
    steps: int = 30
    fault: tuple[int, int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """`error`: what went wrong in the spool, a traceback. `calls` that can be made to fail, `hits` that did."""

    error: str
    calls: int
    hits: int


@functools.cache
def row(node: str, boot: int, seq: int) -> Reading:
    """What a node measures at a seq: always the same, and hard to compress."""
    return reading(seq, boot, node, every_ms=ROW_EVERY_MS, values=(zlib.crc32(f"{node}.{boot}.{seq}".encode()),))


def identity(one: Reading) -> Id:
    return (one.node, one.install, one.boot, one.seq)


def ranges(ids: Iterable[Id]) -> list[list[Any]]:
    """Identities as [node, install, boot, first, last], in order."""
    found: list[list[Any]] = []
    for node, install, boot, seq in ids:
        if found and found[-1][:3] == [node, install, boot] and found[-1][4] + 1 == seq:
            found[-1][4] = seq
        else:
            found.append([node, install, boot, seq, seq])
    return found


class Workload:
    """The server, seen from a test."""

    def __init__(self) -> None:
        here = Path(__file__).parent.parent
        path = os.pathsep.join([str(here), str(here.parent / "edge")])
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "faults.workload"],
            env=os.environ | {"LD_PRELOAD": str(recorder()), "PYTHONPATH": path},
            cwd=here,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, run: Run) -> Outcome:
        """Live through it; the trace is in `run.trace` then."""
        assert self._process.stdin and self._process.stdout
        print(json.dumps(asdict(run)), file=self._process.stdin, flush=True)
        return Outcome(**json.loads(self._process.stdout.readline()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


# In the server.


def say(**said: Any) -> None:
    """Put something into the trace."""
    text = json.dumps(said).encode()
    ctypes.CDLL(None).recorder_mark(text, len(text))


@dataclass
class World:
    """What is outside of the gateway: it outlives it. `nodes`: name -> [boot, next seq, acknowledged up to]."""

    nodes: dict[str, list[int]] = field(default_factory=lambda: {f"n{n}": [1, 0, -1] for n in range(1, 4)})
    boottime: int = 100_000
    unix: int = 1_763_900_000_000
    lives: int = 0


@dataclass(frozen=True, slots=True)
class Manner:
    """How a gateway is configured in one life. `presses`: its limits may cost readings, with a word in the ledger."""

    keep_ms: int = 600_000
    write: str = "when-needed"
    max_bytes: int = 10**9
    limits: dict[LaneName, Limits] = field(default_factory=dict)
    ttl_ms: int = 0
    presses: bool = False


MANNERS = (
    Manner(),
    Manner(keep_ms=30_000),
    Manner(keep_ms=0),
    Manner(write="always"),
    Manner(max_bytes=24_000, presses=True),
    Manner(limits={LaneName.BULK: Limits(max_age_ms=90_000)}, ttl_ms=60_000, presses=True),
)


class Life:
    """One life of a spool, from opening to its end."""

    def __init__(self, folder: Path, world: World, chance: random.Random, manner: Manner) -> None:
        self.world, self.chance, self.manner = world, chance, manner
        self.clock = HandClock(world.boottime, world.unix)
        terms = Terms(
            linger_ms=2000,
            event_linger_ms=1000,
            lazy_ms=60_000,
            stage_readings=600,
            keep_ms=manner.keep_ms,
            write=manner.write,
            limits=manner.limits,
        )
        self._settings = SpoolSettings(folder, terms, manner.max_bytes, 0, trust_card=True)
        self._pending: list[tuple[Ticket, str, int, int]] = []
        self._up: dict[str, bool] = {}

    async def open(self) -> None:
        """Open the spool, again as systemd would where the disk does not let it."""
        for attempt in range(60):
            routes = [RouteTerms("a", 40), RouteTerms("b", 40, self.manner.ttl_ms)]
            self.spool = Spool(self._settings, routes, self.clock)
            try:
                await self.spool.__aenter__()
            except SpoolFault:
                await self.spool._card.close()
                if attempt == 59:
                    raise
            else:
                break
        say(opened=True, keep_ms=self.manner.keep_ms, presses=self.manner.presses, age=self.spool.queue.age_ms())
        self.spool.keep_manifest(MANIFEST)
        # As ingest.remember() does: what was on the card when it was opened is acknowledged.
        for (node, install, boot), upto in self.spool.known():
            if upto >= 0 and node in self.world.nodes:
                say(ack=[node, install, boot, 0, upto])
                if self.world.nodes[node][0] == boot:
                    self.world.nodes[node][2] = max(self.world.nodes[node][2], upto)
        for node in self.world.nodes:
            self.resend(node)

    def resend(self, node: str) -> None:
        """A node sends what it has not heard an ack of, and says what it need not send any more."""
        boot, past, acked = self.world.nodes[node]
        if acked >= 0:
            say(held=[node, INSTALL, boot, 0, acked])
            self.spool.mark((node, INSTALL, boot), 0, acked)
        self.append(node, acked + 1, past)

    def append(self, node: str, first: int, past: int, urgent: Iterable[int] = ()) -> None:
        boot = self.world.nodes[node][0]
        if first < past and past - first <= self.spool.room and self.spool.upto((node, INSTALL, boot)) >= first - 1:
            say(came=[node, INSTALL, boot, first, past - 1], age=self.spool.queue.age_ms())
            ticket = self.spool.append([row(node, boot, seq) for seq in range(first, past)], set(urgent))
            self._pending.append((ticket, node, boot, past - 1))

    def acknowledge(self) -> None:
        """Whatever is safe now is acknowledged, in order."""
        while self._pending and self.spool.is_safe(self._pending[0][0]):
            _, node, boot, upto = self._pending.pop(0)
            say(ack=[node, INSTALL, boot, 0, upto])
            if self.world.nodes[node][0] == boot:
                self.world.nodes[node][2] = max(self.world.nodes[node][2], upto)

    async def idle(self) -> None:
        """Let the spool do what is due, through a failing disk until it works again."""
        self.spool._retention._aged_at = -1e6
        self.spool._work.set()
        for _ in range(PATIENCE):
            if self.spool._committer.done():
                self.spool._committer.result()
            if (
                self.spool._wakes_at is not None
                and not self.spool._work.is_set()
                and not self.spool._trouble.startswith("write failed")
            ):
                return
            await asyncio.sleep(0.0002)
        raise AssertionError(f"the spool does not go on: {self.spool._trouble}")

    async def pass_ms(self, ms: int) -> None:
        self.clock.pass_ms(ms)
        await self.idle()
        say(age=self.spool.queue.age_ms())

    # Steps.

    async def rows_come(self) -> None:
        node = self.chance.choice(list(self.world.nodes))
        state = self.world.nodes[node]
        first, past = state[1], state[1] + self.chance.randint(1, 25)
        urgent = {seq for seq in range(first, past) if self.chance.random() < 0.1}
        if self.spool.upto((node, INSTALL, state[0])) < first - 1:
            self.resend(node)
        state[1] = past
        self.append(node, first, past, urgent)

    async def rows_come_again(self) -> None:
        node = self.chance.choice(list(self.world.nodes))
        past = self.world.nodes[node][1]
        self.append(node, max(0, past - 20), past)

    async def rows_are_dropped_by_their_node(self) -> None:
        node = self.chance.choice(list(self.world.nodes))
        state = self.world.nodes[node]
        key = (node, INSTALL, state[0])
        first, last = state[1], state[1] + self.chance.randint(0, 5)
        state[1] = last + 1
        say(dropped=[*key, first, last])
        for a, b in self.spool.mark(key, first, last):
            self.spool.report(Event("gap", *key, a, b, "dropped by the node"))
        if self.spool.room:
            self._pending.append((self.spool.ticket, node, state[0], self.spool.upto(key)))

    async def node_boots(self) -> None:
        node = self.chance.choice(list(self.world.nodes))
        self.world.nodes[node] = [self.world.nodes[node][0] + 1, 0, -1]

    async def time_passes(self) -> None:
        await self.pass_ms(self.chance.choice((1500, 2500, 2500, 20_000, 61_000)))

    async def link_changes(self) -> None:
        route = self.chance.choice(ROUTES)
        self._up[route] = up = not self._up.get(route)
        self.spool.link(route, up=up, durable=up and (route == "a" or self.chance.random() < 0.5))
        await self.idle()

    async def readings_go(self) -> None:
        for route in ROUTES:
            if not self._up.get(route):
                continue
            for kind in ("urgent", "live", "backfill"):
                batch = await self.spool.take(route, kind, self.chance.choice((7, 40)))  # type: ignore[arg-type]
                if batch is not None and self.chance.random() < 0.9:
                    self.confirm(route, batch)
        await self.idle()

    def confirm(self, route: str, batch: Batch) -> None:
        durable = self.spool.queue.links[route].durable
        say(confirmed=route, durable=durable, ids=ranges(identity(one) for one in batch.readings))
        self.spool.confirm(route, batch)

    async def a_reading_is_refused(self) -> None:
        route = self.chance.choice(ROUTES)
        batch = await self.spool.take(route, "live", 1) if self._up.get(route) else None
        if batch is not None and batch.readings:
            say(refused=route, ids=ranges(identity(one) for one in batch.readings))
            self.spool.set_aside(route, batch.readings[0], "the far side does not like it")
            self.spool.confirm(route, batch)

    async def readings_are_replayed(self) -> None:
        await self.spool.replay(self.chance.choice(ROUTES), 0, node=self.chance.choice(("", "n1")))

    async def a_person_looks_at_what_was_refused(self) -> None:
        for refused in (await self.spool.refused())[:1]:
            await self.spool.settle(refused, dropped=self.chance.random() < 0.5)

    async def gateway_reports(self) -> None:
        self.spool.report(Event("presence", "n1", INSTALL, 1, 0, None, "lost"))

    async def step(self) -> None:
        """Something happens."""
        steps = {
            self.rows_come: 12,
            self.time_passes: 8,
            self.readings_go: 6,
            self.link_changes: 3,
            self.rows_come_again: 1,
            self.rows_are_dropped_by_their_node: 1,
            self.node_boots: 1,
            self.a_reading_is_refused: 1,
            self.readings_are_replayed: 0.5,
            self.a_person_looks_at_what_was_refused: 0.5,
            self.gateway_reports: 0.5,
        }
        (chosen,) = self.chance.choices(list(steps), list(steps.values()))
        with contextlib.suppress(SpoolFault):  # told to who asked; the spool itself goes on
            await chosen()
        self.acknowledge()

    def save(self, path: Path) -> None:
        """What the world knows now."""
        self.world.boottime, self.world.unix = self.clock.boottime, self.clock.unix
        new = path.with_suffix(".new")
        new.write_text(json.dumps(asdict(self.world)))
        new.replace(path)


async def live(run: Run, number: int, world: World, saved: Path) -> None:
    """One life. The last one ends in order, with everything acknowledged; the others often by a kill."""
    chance = random.Random(f"{run.seed}/{number}")
    is_last = number == run.lives - 1
    manner = MANNERS[0] if is_last else chance.choice(MANNERS)
    one = Life(Path(run.root) / "spool", world, chance, manner)
    await one.open()
    one.save(saved)
    for _ in range(run.steps):
        await one.step()
        one.save(saved)
    if is_last:
        for node in world.nodes:
            one.resend(node)
            first = world.nodes[node][1]
            world.nodes[node][1] += 5
            one.append(node, first, first + 5)
        await one.pass_ms(2500)
        one.acknowledge()
        assert not one._pending, f"not acknowledged: {one._pending}, {one.spool.state} {one.spool._trouble}"
    elif chance.random() < 0.6:
        os._exit(0)
    await one.spool.__aexit__(None, None, None)
    one.acknowledge()
    one.save(saved)


def in_a_process(run: Run, number: int, saved: Path) -> str:
    """One life in a process of its own; returns what went wrong."""
    report = saved.with_suffix(".error")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.alarm(60)
            draw_from(random.Random(f"secrets {run.seed}/{number}"))
            world = World(**json.loads(saved.read_text()))
            asyncio.run(live(run, number, world, saved))
            code = 0
        except BaseException:
            report.write_text(traceback.format_exc())
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    say(ended=True)
    code = os.waitstatus_to_exitcode(status)
    if code in (0, 137):
        return ""
    return report.read_text() if report.exists() else f"ended with {code}"


def draw_from(chance: random.Random) -> None:
    """Draw what the spool draws by chance from a seed, so that a run can be had again."""
    secrets.token_hex = lambda count=6: chance.randbytes(count).hex()  # type: ignore[assignment,misc]


def said_born(path: Path) -> str:
    """What `born` says, put into the trace: a copy of this file at a crash point is to count as this file."""
    identity = born(path)
    say(path=str(path).partition("/root/")[2], born=identity)
    return identity


def serve() -> None:
    """Run what comes on stdin."""
    logging.disable(logging.CRITICAL)  # thousands of spools say that their disk fails, as it is made to
    fieldpost.spool.RETRY_COMMIT_S = 0.001
    sys.modules["fieldpost.spool.database"].CHECKPOINT_PAGES = CHECKPOINT_PAGES  # type: ignore[attr-defined]
    for module in ("folder", "log"):
        sys.modules[f"fieldpost.spool.{module}"].born = said_born  # type: ignore[attr-defined]
    recorder_ = ctypes.CDLL(None)
    recorder_.recorder_calls.restype = recorder_.recorder_left.restype = ctypes.c_uint64
    for line in sys.stdin:
        run = Run(**json.loads(line))
        saved = Path(run.trace).with_suffix(".world")
        saved.write_text(json.dumps(asdict(World())))
        recorder_.recorder_begin(run.root.encode(), run.trace.encode())
        times = 0
        if run.fault is not None:
            first, times, victim, how = run.fault
            recorder_.recorder_arm(ctypes.c_uint64(first), ctypes.c_uint64(times), victim, How(how).value)
        error = ""
        for number in range(run.lives):
            error = error or in_a_process(run, number, saved)
        outcome = Outcome(error, recorder_.recorder_calls(), times - recorder_.recorder_left())
        recorder_.recorder_begin(b"", b"")
        print(json.dumps(asdict(outcome)), flush=True)


if __name__ == "__main__":
    serve()
