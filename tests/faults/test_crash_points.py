"""The power goes at any point of the true trace of the spool's calls, and any call fails: nothing acknowledged is lost.

`python -m tests.faults.crash` does it for all points and all calls; here are samples by seed, and what was found once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from faults.crash import LIVES, STEPS, Judge, Tally, a_run, crash_points, every_failure, fail, failures, live, scratch
from faults.recording import Call, Event
from faults.workload import Workload

SEED = int(os.environ.get("FIELDPOST_SEED", 20_261_124))
"""The same in every run, so that a failure speaks of the change that it came with; `make prove` tries others."""


@pytest.fixture(scope="module")
def workload() -> Iterator[Workload]:
    with Workload() as server:
        yield server


@pytest.fixture
def folder() -> Iterator[Path]:
    with scratch() as place:
        yield place


def test_a_power_cut_at_some_points_loses_nothing_acknowledged() -> None:
    tally = Tally()
    crash_points(SEED, tally, lives=2, steps=10, points=25)
    print(f"FIELDPOST_SEED={SEED}: {tally.images} images of {tally.points} points, {tally.opened} opened")
    assert tally.faults == []


@pytest.mark.slow
def test_a_power_cut_at_many_points_loses_nothing_acknowledged() -> None:
    tally = Tally()
    crash_points(SEED, tally, points=150)
    print(f"FIELDPOST_SEED={SEED}: {tally.images} images of {tally.points} points, {tally.opened} opened")
    assert tally.faults == []


@pytest.mark.slow
def test_a_call_that_fails_loses_nothing_acknowledged() -> None:
    tally = Tally()
    every_failure(SEED, tally, sample=30)
    print(f"FIELDPOST_SEED={SEED}: {tally.runs} runs, {tally.images} images; {dict(tally.injected)}")
    assert tally.faults == []


# The judge must be able to find something.


def found(folder: Path, events: list[Event]) -> str:
    tally = Tally()
    acks = [number for number, event in enumerate(events) if event.call is Call.MARK and "ack" in event.said]
    Judge(folder, tally, 1).judge(events, "a bad disk or spool", acks)
    return " ".join(tally.faults)


def a_trace(workload: Workload, folder: Path) -> list[Event]:
    outcome, events = live(workload, folder, a_run(folder, 1, lives=2, steps=8))
    assert outcome.error == "" and outcome.calls > 100
    return events


def test_the_judge_finds_what_a_disk_loses_that_lies_about_syncs(workload: Workload, folder: Path) -> None:
    events = a_trace(workload, folder)
    assert found(folder, events) == ""
    assert "lost" in found(folder, [event for event in events if event.call is not Call.FSYNC])


@pytest.mark.slow
def test_the_judge_finds_an_ack_that_comes_before_its_commit(workload: Workload, folder: Path) -> None:
    events = a_trace(workload, folder)
    early: list[Event] = []
    for event in events:
        if event.call is Call.MARK and "ack" in event.said:
            came = max(n for n, e in enumerate(early) if e.call is Call.MARK and {"came", "opened"} & e.said.keys())
            early.insert(came + 1, event)
        else:
            early.append(event)
    assert "lost" in found(folder, early)


@pytest.mark.slow
def test_the_judge_finds_a_failed_sync_that_is_believed(workload: Workload, folder: Path) -> None:
    events = a_trace(workload, folder)
    first = next(n for n, event in enumerate(events) if event.call is Call.MARK and "came" in event.said)
    sync = next(n for n, event in enumerate(events) if n > first and event.call is Call.FSYNC)
    assert "lost" in found(folder, [*events[:sync], replace(events[sync], failed=True), *events[sync + 1 :]])


@pytest.mark.slow
def test_the_judge_finds_a_confirmation_of_what_was_never_delivered(workload: Workload, folder: Path) -> None:
    events = a_trace(workload, folder)
    unsaid = [event for event in events if event.call is not Call.MARK or "confirmed" not in event.said]
    assert "skipped" in found(folder, unsaid)


# What was found once.


@pytest.mark.parametrize("seed", [2, 7])
def test_seeds_of_the_short_run_that_found_something_once(seed: int) -> None:
    """A first page that was torn as it was made counted as damage; and the journal beside it was left for the new file
    that took its place, and rolled that back."""
    tally = Tally()
    crash_points(seed, tally, lives=2, steps=10, points=25)
    assert tally.faults == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 11])
def test_seeds_that_found_something_once(seed: int) -> None:
    """0: a power cut took the spool's whole folder, whose name was never synced; and the log, but not the mark that it
    had been there. 1: a torn header of the log counted as damage. 11: a replay met what had been pruned."""
    tally = Tally()
    crash_points(seed, tally, points=80)
    assert tally.faults == []


def failed_syncs(workload: Workload, folder: Path, seed: int, word: str) -> list[str]:
    """What is found when each sync of a run fails, one after the other; before, and while the spool is at work."""
    tally = Tally()
    for failure in failures(live(workload, folder, a_run(folder, seed, lives=LIVES, steps=STEPS))[1], seed):
        if failure.call is Call.FSYNC and failure.word == word:
            fail(workload, folder, failure, tally)
    assert tally.runs > 20
    return tally.faults


@pytest.mark.slow
def test_a_sync_that_fails_once_leaves_a_spool_with_its_log_and_its_name(workload: Workload, folder: Path) -> None:
    """SQLite fell back to another journal without a word, and went on with a log whose name was not durable."""
    assert failed_syncs(workload, folder, 2, "EIO") == []


@pytest.mark.slow
def test_what_a_failed_sync_left_is_not_believed_when_the_file_is_opened_again(
    workload: Workload, folder: Path
) -> None:
    """The kernel showed a log that was not on the disk, and what was acknowledged behind it went with it."""
    assert failed_syncs(workload, folder, 2, "EIO for 5 calls") == []
