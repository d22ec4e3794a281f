"""Dates for nodes without a clock: a delay only adds, so the smallest offset is the best."""

from __future__ import annotations

import random

from fieldpost.nodes.time import DELAY_FEW_MS, DELAY_MS, DRIFT_PPM, EARLIEST_UNKNOWN, FEW_MESSAGES, WINDOW_MS, Dating
from fieldpost.reading import Quality
from fieldpost.wire import Anchor
from hypothesis import given
from hypothesis import strategies as st

I = "a1b2c3d4e5f6"  # noqa: E741  # the protocol's own letter
UNIX = 1_763_900_000_000


def dated(
    dating: Dating, uptimes: list[int], now: int, *, boot: int = 1, anchor: Anchor | None = None
) -> list[tuple[int, int]]:
    return dating.date("n1", I, boot, uptimes, anchor, now, UNIX + now)[0]


def test_the_smallest_delay_dates_and_later_messages_improve_it() -> None:
    dating = Dating()
    dating.hear("n1", I, 1, 1_000, 11_700)  # booted at 10 000, 700 ms on the way
    assert dated(dating, [1_000], 11_700) == [(UNIX + 11_700, DELAY_FEW_MS)]
    dating.hear("n1", I, 1, 5_000, 15_020)
    assert dated(dating, [1_000, 5_000], 15_020) == [(UNIX + 11_020, DELAY_FEW_MS), (UNIX + 15_020, DELAY_FEW_MS)]


def test_the_true_moment_lies_within_the_error_for_a_crystal_that_drifts() -> None:
    chance = random.Random(7)
    for ppm in (-50, 0, 50):
        dating, boot_at = Dating(), 100_000
        for minute in range(1, 60 * 24):
            true_ms = minute * 60_000
            uptime = true_ms + true_ms * ppm // 1_000_000
            # The first message is no faster than the radio lets it; later some are quick, most are not.
            delay = chance.choice([5, 8, 20, 40, 3_000]) if minute > 1 else 900
            dating.hear("n1", I, 1, uptime, boot_at + true_ms + delay)
            ((at, error),) = dated(dating, [uptime], boot_at + true_ms + delay)
            assert abs(at - (UNIX + boot_at + true_ms)) <= error
            assert error <= DELAY_FEW_MS + WINDOW_MS * DRIFT_PPM // 1_000_000
    assert error <= DELAY_MS + WINDOW_MS * DRIFT_PPM // 1_000_000


def test_an_older_boot_is_dated_by_its_anchor() -> None:
    anchor = Anchor(uptime_ms=50_000, unix_ms=UNIX, precision_ms=20)
    ((at, error),) = dated(Dating(), [80_000], 900_000, anchor=anchor)
    assert at == UNIX + 30_000
    assert error == 20 + 30_000 * DRIFT_PPM // 1_000_000


def test_a_boot_that_never_heard_the_time_lies_between_its_neighbours() -> None:
    dating = Dating()
    dating.hear("n1", I, 1, 0, 10_000)
    dated(dating, [20_000], 30_000)  # the last of boot 1, at 30 000
    dating.hear("n1", I, 3, 0, 90_000)  # boot 3 began at 90 000
    assert dated(dating, [7_000], 95_000, boot=2) == [(UNIX + 60_000, 30_000)]


def test_a_first_boot_that_never_heard_the_time_is_not_later_than_the_next() -> None:
    dating = Dating()
    dating.hear("n1", I, 2, 0, 90_000)
    assert dated(dating, [7_000], 95_000, boot=1) == [(UNIX + 90_000, EARLIEST_UNKNOWN)]


def test_each_date_says_what_it_rests_on() -> None:
    dating = Dating()
    anchor = Anchor(uptime_ms=50_000, unix_ms=UNIX, precision_ms=20)
    assert dating.date("n1", I, 1, [80_000], anchor, 900_000, UNIX)[1] == Quality.ANCHORED
    assert dating.date("n1", I, 1, [80_000], None, 900_000, UNIX)[1] == Quality.BOUNDED
    dating.hear("n1", I, 1, 80_000, 900_000)
    assert dating.date("n1", I, 1, [80_000], anchor, 900_000, UNIX)[1] == Quality.SYNCED


delays = st.lists(st.one_of(st.integers(5, 60), st.integers(5, 20_000)), min_size=FEW_MESSAGES + 2, max_size=60)


@given(st.integers(-80, 80), st.integers(0, 10**9), delays, st.integers(5, DELAY_MS), st.integers(1000, 120_000))
def test_one_quick_message_an_hour_keeps_every_date_within_its_error(
    ppm: int, boot_at: int, slow: list[int], quick: int, every_ms: int
) -> None:
    dating = Dating()
    quick_at = 0
    for n, delay in enumerate([quick, *slow]):
        true_ms = 1000 + n * every_ms
        if true_ms - quick_at > WINDOW_MS - every_ms:
            quick_at, delay = true_ms, quick
        uptime = true_ms + true_ms * ppm // 1_000_000
        received = boot_at + true_ms + delay
        dating.hear("n1", I, 1, uptime, received)
        # What was measured a while ago, and waited in the node's outbox, is dated as well.
        for ago in (0, min(true_ms, 600_000)):
            ((at, error),) = dated(dating, [uptime - ago], received)
            assert abs(at - (UNIX + boot_at + true_ms - ago)) <= error


@given(st.lists(st.integers(0, 10**7), min_size=2, max_size=20), st.integers(0, 5000))
def test_rows_of_a_boot_keep_their_distances(uptimes: list[int], delay: int) -> None:
    dating = Dating()
    dating.hear("n1", I, 1, max(uptimes), 10**8 + delay)
    found = dated(dating, uptimes, 10**8 + delay)
    assert [at - found[0][0] for at, _ in found] == [uptime - uptimes[0] for uptime in uptimes]


@given(st.integers(-(10**12), 10**12))
def test_a_step_of_the_wall_clock_moves_dates_by_just_that_and_errors_not_at_all(by: int) -> None:
    dating = Dating()
    dating.hear("n1", I, 1, 1000, 50_000)
    dating.hear("n1", I, 1, 2000, 51_500)
    before, _ = dating.date("n1", I, 1, [500, 1500], None, 60_000, UNIX)
    after, _ = dating.date("n1", I, 1, [500, 1500], None, 60_000, UNIX + by)
    assert [(at + by, error) for at, error in before] == after


@given(st.integers(0, 10**9), st.integers(0, 10**8), st.integers(1, 10**9))
def test_an_interval_between_two_boots_holds_the_truth(began: int, lasted: int, later: int) -> None:
    dating, middle = Dating(), began + lasted
    dating.hear("n1", I, 1, 0, began)
    dated(dating, [lasted], middle)
    dating.hear("n1", I, 3, 0, middle + later)
    ((at, error),) = dated(dating, [7], middle + later, boot=2)
    assert at - error - 1 <= UNIX + middle and UNIX + middle + later <= at + error + 1
