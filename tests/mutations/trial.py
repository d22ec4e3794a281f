"""One trial: a copy of the project with one bug in it, and whether the tests that run on it see the bug."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .catalogue import Edit, Mutation

REPO = Path(__file__).parents[2]
LEFT_OUT = (".*", "__pycache__", "dist")
QUICK = ("tests", "-m", "not slow", "--deselect", "tests/mutations")

TEST_TIMEOUT_S = 60
"""A test that hangs on a bug has seen it; one that waits in vain for a state says so after half of this."""

TRIAL_TIMEOUT_S = 600

OWN_FAULTS = ("NameError", "ImportError", "SyntaxError", "AttributeError", "ModuleNotFoundError")
"""A mutation that ends so is no bug of the museum but one of the catalogue."""


class Unfit(Exception):
    """The trial proves nothing: the mutation does not apply, or the tests ran on something else than the copy."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """`caught_by`: the tests that failed; nobody's where the mutation survived. `how`: the first one's last word."""

    mutation: Mutation
    caught_by: tuple[str, ...]
    how: str
    seconds: float

    @property
    def survived(self) -> bool:
        return not self.caught_by


def apply(edits: Sequence[Edit], root: Path) -> None:
    """Make the replacements below `root`. Raises Unfit where a text is not there just once."""
    for edit in edits:
        path = root / edit.file
        text = path.read_text()
        if (count := text.count(edit.old)) != 1:
            raise Unfit(f"{edit.file}: {count} places, not one, with {edit.old!r}")
        path.write_text(text.replace(edit.old, edit.new))


@contextlib.contextmanager
def copied(source: Path = REPO) -> Iterator[Path]:
    """The project, or a copy of it, in a folder of its own; `build` comes along, for the firmware's library."""
    with tempfile.TemporaryDirectory(prefix="fieldpost-mutant-") as name:
        root = Path(name) / "project"
        shutil.copytree(source, root, ignore=shutil.ignore_patterns(*LEFT_OUT))
        yield root


def run(root: Path, arguments: Sequence[str]) -> tuple[int, str]:
    """pytest's exit code and words, on the copy. Raises Unfit where another Fieldpost was imported."""
    witness = root.parent / "witness.json"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(root / folder) for folder in ("edge", "tests")),
        "PYTHONDONTWRITEBYTECODE": "1",
        "FIELDPOST_WITNESS": str(witness),
        "COLUMNS": "400",
    }
    plugins = ("-p", "mutations.witness", "-p", "no:cacheprovider", f"--timeout={TEST_TIMEOUT_S}")
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--tb=line",
            "--show-capture=no",
            *plugins,
            f"--rootdir={root}",
            *arguments,
        ],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=TRIAL_TIMEOUT_S)
    except BaseException as reason:
        os.killpg(process.pid, signal.SIGKILL)  # what the tests started goes with them
        said, _ = process.communicate()
        if not isinstance(reason, subprocess.TimeoutExpired):
            raise
        return 1, said + "\nshort test summary info\nFAILED all - nothing came to an end\n"
    imported = json.loads(witness.read_text()) if witness.exists() else []
    if not imported or not all(Path(path).is_relative_to(root / "edge") for path in imported):
        raise Unfit(f"not (only) the copy in {root} was imported: {imported}\n{said[-2000:]}")
    return process.returncode, said


def failures(said: str) -> list[tuple[str, str]]:
    """(test, its last word) of each that failed, from pytest's summary."""
    summary = said.rpartition("short test summary info")[2]
    lines = [
        line.partition(" ")[2]
        for line in map(str.strip, summary.splitlines())
        if line.startswith(("FAILED ", "ERROR "))
    ]
    return [(test, how) for test, _, how in (line.partition(" - ") for line in lines)]


def control(tests: Sequence[str], source: Path = REPO) -> float:
    """How many seconds these tests take on a copy without any bug. Raises Unfit where one fails."""
    began = time.monotonic()
    with copied(source) as root:
        code, said = run(root, sorted(set(tests)))
    if code != 0:
        raise Unfit(f"fails without any mutation:\n{said[-4000:]}")
    return time.monotonic() - began


def attempt(mutation: Mutation, source: Path = REPO, *, whole: bool = False) -> Outcome:
    """Put the bug into a copy and run the tests that are known to see it, then the quick part if they did not.

    `whole`: the quick part at once, and all of it. Raises Unfit where the mutation is none.
    """
    began = time.monotonic()
    with copied(source) as root:
        apply(mutation.edits, root)
        found = [] if whole else _failed(root, mutation, ("-x", *mutation.caught_by))
        if not found:
            found = _failed(root, mutation, QUICK if whole else ("-x", *QUICK))
            if found:
                control([test for test, _ in found], source)  # nobody has seen these pass yet
    tests = tuple(test for test, _ in found)
    return Outcome(mutation, tests, found[0][1] if found else "", time.monotonic() - began)


def _failed(root: Path, mutation: Mutation, arguments: Sequence[str]) -> list[tuple[str, str]]:
    code, said = run(root, arguments)
    found = failures(said)
    if code not in (0, 1) or bool(code) != bool(found):
        raise Unfit(f"{mutation.name}: pytest ended with {code}:\n{said[-2000:]}")
    if found and any(word in found[0][1] for word in OWN_FAULTS):
        raise Unfit(f"{mutation.name}: does not run: {found[0][1]}")
    return found
