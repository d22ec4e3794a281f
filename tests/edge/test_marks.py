"""Identity marks against the plainest model there is: the set of sequence numbers."""

from __future__ import annotations

from fieldpost.spool.marks import KEPT_BOOTS, MAX_RANGES, BootMarks, Marks
from hypothesis import given
from hypothesis import strategies as st

spans = st.tuples(st.integers(0, 60), st.integers(0, 12)).map(lambda span: (span[0], span[0] + span[1]))


def rows(ranges: list[tuple[int, int]]) -> set[int]:
    return {seq for first, last in ranges for seq in range(first, last + 1)}


@given(st.lists(spans, max_size=40))
def test_marks_take_each_row_once_and_know_the_contiguous_part(taken: list[tuple[int, int]]) -> None:
    marks, model = BootMarks(), set[int]()
    for first, last in taken:
        asked = set(range(first, last + 1))
        assert rows(marks.take(first, last)) == asked - model
        model |= asked
        contiguous = -1
        while contiguous + 1 in model:
            contiguous += 1
        assert marks.upto == contiguous
        assert rows(marks.beyond) == {seq for seq in model if seq > contiguous}
        assert all(a[1] + 1 < b[0] for a, b in zip(marks.beyond, marks.beyond[1:], strict=False))
        assert all(marks.has(seq) == (seq in model) for seq in range(80))


def test_a_boot_with_too_many_holes_takes_nothing_more_until_some_are_filled() -> None:
    marks = BootMarks()
    for n in range(MAX_RANGES):
        assert marks.take(2 * n + 1, 2 * n + 1)
    assert marks.take(500, 500) == []
    assert not marks.has(500)
    assert marks.take(0, 0) == [(0, 0)]
    assert marks.take(500, 500) == [(500, 500)]


def test_only_the_newest_boots_of_a_node_are_remembered() -> None:
    marks = Marks()
    for boot in range(KEPT_BOOTS + 3):
        marks.take(("n1", "a1b2c3d4e5f6", boot), 0, 9)
    assert [boot for _, _, boot in marks.boots("n1")] == list(range(3, KEPT_BOOTS + 3))
    saved, forgotten = marks.changes()
    assert {key[2] for key, _, _ in saved} == set(range(3, KEPT_BOOTS + 3))
    assert {key[2] for key in forgotten} == {0, 1, 2}


def test_changes_that_could_not_be_saved_are_handed_out_again() -> None:
    marks = Marks()
    key = ("n1", "a1b2c3d4e5f6", 1)
    marks.take(key, 0, 4)
    changes = marks.changes()
    assert changes[0] == [(key, 4, [])]
    assert marks.changes() == ([], [])
    marks.put_back(changes)
    assert marks.changes() == changes


steps = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(1, KEPT_BOOTS + 4), spans),
        st.tuples(st.just("save"), st.just(0), st.just((0, 0))),
        st.tuples(st.just("save, which fails"), st.just(0), st.just((0, 0))),
        st.tuples(st.just("crash"), st.just(0), st.just((0, 0))),
    ),
    max_size=40,
)


@given(steps)
def test_after_a_crash_the_marks_are_those_of_the_last_save_that_succeeded(
    happened: list[tuple[str, int, tuple[int, int]]],
) -> None:
    marks, disk, saved = Marks(), dict[tuple[str, str, int], tuple[int, list[tuple[int, int]]]](), marks_of(Marks())
    for what, boot, span in happened:
        if what == "take":
            marks.take(("n1", "a1b2c3d4e5f6", boot), *span)
        elif what == "save":
            changed, gone = marks.changes()
            disk = {key: value for key, value in disk.items() if key not in gone}
            disk |= {key: (upto, beyond) for key, upto, beyond in changed}
            saved = marks_of(marks)
        elif what == "save, which fails":
            marks.put_back(marks.changes())
        else:
            marks = Marks()
            for key, (upto, beyond) in sorted(disk.items()):
                marks.load(key, upto, beyond)
            assert marks_of(marks) == saved
        assert len(marks.boots("n1")) <= KEPT_BOOTS


def marks_of(marks: Marks) -> dict[tuple[str, str, int], tuple[int, list[tuple[int, int]]]]:
    return {key: (upto, marks.boot(key).beyond) for key, upto in marks.known()}


@given(st.lists(st.tuples(st.sampled_from(["n1", "n2"]), st.integers(1, 3), spans), max_size=30))
def test_nodes_and_boots_are_apart(taken: list[tuple[str, int, tuple[int, int]]]) -> None:
    together = Marks()
    apart: dict[tuple[str, str, int], BootMarks] = {}
    for node, boot, span in taken:
        key = (node, "a1b2c3d4e5f6", boot)
        assert together.take(key, *span) == apart.setdefault(key, BootMarks()).take(*span)
    assert dict(together.known()) == {key: marks.upto for key, marks in apart.items()}
