"""The gateway's clock: what a step of it does to dates, against clocks whose truth the test knows."""

from __future__ import annotations

from dataclasses import dataclass

from fieldpost.clock import KEPT_ERAS, STEP_MS, Eras
from hypothesis import given
from hypothesis import strategies as st

TRUTH = 1_763_900_000_000
"""The true date at CLOCK_BOOTTIME 0 of the first boot."""


@dataclass
class Machine:
    """A machine in one of its boots: its wall clock is `off_ms` from the truth."""

    boot: int = 1
    boottime_ms: int = 1000
    began_ms: int = TRUTH
    off_ms: int = -(10**11)
    synced: bool = False

    @property
    def true_ms(self) -> int:
        return self.began_ms + self.boottime_ms

    def look(self, eras: Eras) -> int:
        """Observe; returns the era that it is now."""
        eras.observe(f"boot-{self.boot}", self.boottime_ms, self.true_ms + self.off_ms, self.synced)
        return eras.now.number


# What may happen: time passes, the clock is set right, it is set wrong by hand, the machine starts again.
steps = st.lists(
    st.one_of(
        st.tuples(st.just("passes"), st.integers(1, 10**7)),
        st.tuples(st.just("set right"), st.just(0)),
        st.tuples(st.just("set wrong"), st.integers(-(10**12), 10**12)),
        st.tuples(st.just("starts again"), st.integers(1, 10**9)),
        st.tuples(st.just("drifts"), st.integers(-STEP_MS // 4, STEP_MS // 4)),
    ),
    max_size=30,
)


def live(machine: Machine, what: str, amount: int) -> None:
    match what:
        case "passes":
            machine.boottime_ms += amount
        case "set right":
            machine.off_ms, machine.synced = 0, True
        case "set wrong":
            machine.off_ms, machine.synced = amount, False
        case "starts again":
            machine.began_ms = machine.true_ms + amount
            machine.boot, machine.boottime_ms, machine.off_ms, machine.synced = machine.boot + 1, 1, -(10**11), False
        case "drifts":
            machine.off_ms += amount if not machine.synced else 0


@given(steps)
def test_dates_of_a_boot_whose_clock_was_set_once_are_right_whenever_they_were_made(
    happened: list[tuple[str, int]],
) -> None:
    machine, eras = Machine(), Eras([])
    rows: list[tuple[int, int, int, int]] = []  # boot, era, the date that it was given, the truth
    was_right: set[int] = set()
    for what, amount in [("passes", 1), *happened]:
        live(machine, what, amount)
        era = machine.look(eras)
        rows.append((machine.boot, era, machine.true_ms + machine.off_ms, machine.true_ms))
        if machine.synced:
            was_right.add(machine.boot)
    for boot, era, date, truth in rows:
        by = 0 if eras.is_synced(era) else eras.correction_ms(era)
        if boot in was_right:
            assert by is not None
            assert abs(date + by - truth) <= 2 * STEP_MS
        elif by is not None:
            assert eras.is_synced(era) or boot in was_right, "a date was corrected by nobody who knew it"


@given(steps, st.integers(0, 30))
def test_eras_go_on_over_a_restart_of_the_gateway_as_if_there_had_been_none(
    happened: list[tuple[str, int]], at: int
) -> None:
    machine, one, other = Machine(), Eras([]), Eras([])
    machine.look(one)
    machine.look(other)
    for n, (what, amount) in enumerate(happened):
        if n == at:
            other = Eras(other.known)
        live(machine, what, amount)
        assert machine.look(one) == machine.look(other)
        assert one.known == other.known
        assert [one.correction_ms(e.number) for e in one.known] == [other.correction_ms(e.number) for e in one.known]


@given(st.integers(-STEP_MS, STEP_MS), st.booleans())
def test_a_clock_that_is_slewed_begins_no_era(by: int, was_synced: bool) -> None:
    eras = Eras([])
    assert eras.observe("boot-1", 1000, TRUTH, was_synced) is not None
    assert eras.observe("boot-1", 2000, TRUTH + 1000 + by, was_synced) is None
    assert eras.is_synced(eras.now.number) is was_synced


@given(st.one_of(st.integers(STEP_MS + 1, 10**13), st.integers(-(10**13), -STEP_MS - 1)))
def test_a_step_by_nobody_who_vouches_for_it_makes_the_clock_one_that_is_not_trusted(by: int) -> None:
    eras = Eras([])
    eras.observe("boot-1", 1000, TRUTH, True)
    assert eras.observe("boot-1", 2000, TRUTH + 1000 + by, False) is not None
    assert not eras.is_synced(eras.now.number)
    assert eras.correction_ms(eras.now.number) == -by, "what was right before says what is wrong now"


def test_a_clock_that_was_set_stays_good_when_the_line_to_its_source_goes() -> None:
    eras = Eras([])
    eras.observe("boot-1", 1000, TRUTH, True)
    assert eras.observe("boot-1", 10**7, TRUTH + 10**7 - 1000, False) is None
    assert eras.is_synced(eras.now.number)


def test_no_other_boot_of_the_machine_corrects_a_date() -> None:
    eras = Eras([])
    eras.observe("boot-1", 1000, 0, False)
    eras.observe("boot-2", 1000, TRUTH, True)
    assert eras.correction_ms(1) is None


def test_only_so_many_eras_are_kept_and_none_of_the_forgotten_is_trusted() -> None:
    eras = Eras([])
    for n in range(KEPT_ERAS + 10):
        eras.observe(f"boot-{n}", 1000, TRUTH, True)
    assert [era.number for era in eras.known] == list(range(11, KEPT_ERAS + 11))
    assert not eras.is_synced(10) and eras.correction_ms(10) is None
    assert Eras(eras.known).known == eras.known
