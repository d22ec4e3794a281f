"""A route's progress against the plainest model there is: for each position, what has become of it."""

from __future__ import annotations

from dataclasses import replace

from fieldpost.spool.progress import Flight, Progress, Span
from hypothesis import given
from hypothesis import strategies as st

HEAD = 40
ends = st.tuples(st.integers(0, HEAD - 12), st.integers(1, 12)).map(lambda at: (at[0], at[0] + at[1]))


def whole(progress: Progress, head: int) -> set[int]:
    """The positions that the route still wants, replays left out."""
    found = {at for span in progress.spans if span.whole for at in range(span.first, span.past)}
    return found | set(range(progress.live, head))


def wanted(progress: Progress, head: int) -> set[int]:
    return {at for first, past in progress.pieces(head) for at in range(first, past)}


@st.composite
def histories(draw: st.DrawFn) -> tuple[Progress, set[int]]:
    """Some progress with the positions that it wants, after things given up here and there and some outages."""
    progress, model, head = Progress(draw(st.integers(0, 5))), set[int](), 0
    model = set(range(progress.live, HEAD))
    for _ in range(draw(st.integers(0, 6))):
        if draw(st.booleans()):
            first, past = draw(ends)
            progress.skip(first, past)
            model -= set(range(first, past))
        else:
            head = draw(st.integers(head, HEAD))
            progress.set_back(head)
    return progress, model


@given(histories())
def test_an_outage_and_what_is_given_up_lose_no_other_position(history: tuple[Progress, set[int]]) -> None:
    progress, model = history
    assert whole(progress, HEAD) == model
    assert sum(progress.backlog(HEAD)) == len(model), "a position is in two places"
    assert progress.oldest() == min([*model, max(progress.live, HEAD)]) or not model
    for first in range(HEAD):
        assert progress.touches(first, first + 1) == (first in model or first >= progress.live)
        assert progress.outstanding(first) == min(
            [at for at in model if at >= first], default=max(first, progress.live)
        )


@given(histories(), st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(1, 9)), max_size=25))
def test_what_is_confirmed_in_order_is_all_of_it_and_each_once(
    history: tuple[Progress, set[int]], steps: list[tuple[bool, bool, int]]
) -> None:
    progress, model = history
    sent: list[int] = []
    flying: dict[bool, list[Flight]] = {True: [], False: []}
    drain = [(live, confirms, 9) for _ in range(HEAD) for live in (True, False) for confirms in (False, True)]
    for is_live, confirms, limit in [*steps, *drain]:
        if confirms and flying[is_live]:
            progress.confirm(flight := flying[is_live].pop(0))
            sent += range(flight.first, flight.past)
            assert whole(progress, HEAD) == model - set(sent)
        elif is_live and not confirms and progress.next_live() < HEAD:
            first = progress.next_live()
            flying[True].append(progress.fly(first, min(HEAD, first + limit), None))
        elif not is_live and not confirms and (late := progress.next_history()) is not None:
            flying[False].append(progress.fly(late[0], min(late[1].past, late[0] + limit), late[1]))
    assert sorted(sent) == sorted(model)
    assert not progress.flying


@given(histories(), st.data())
def test_what_was_on_its_way_when_the_link_went_is_sent_again(
    history: tuple[Progress, set[int]], data: st.DataObject
) -> None:
    progress, model = history
    for _ in range(data.draw(st.integers(0, 4))):
        if progress.next_live() < HEAD:
            progress.fly(progress.next_live(), min(HEAD, progress.next_live() + 3), None)
        if (late := progress.next_history()) is not None:
            progress.fly(late[0], min(late[1].past, late[0] + 3), late[1])
    progress.let_go()
    assert whole(progress, HEAD) == model
    assert progress.next_live() == progress.live
    if (late := progress.next_history()) is not None:
        assert late[0] == late[1].first == progress.spans[0].first


@given(histories(), st.integers(0, HEAD))
def test_saved_progress_is_never_ahead_of_the_card(history: tuple[Progress, set[int]], committed: int) -> None:
    progress, model = history
    live, spans = progress.saved(committed)
    again = Progress(live, spans)
    assert live <= committed and all(span.past <= committed for span in spans)
    assert (
        whole(again, HEAD) == {at for at in model if at < committed} | set(range(committed, HEAD)) or live < committed
    )
    assert whole(again, HEAD) >= model


@given(histories(), ends, st.sampled_from(["", "n1"]), st.sampled_from([0, 5]))
def test_a_replay_adds_what_is_not_outstanding_anyway(
    history: tuple[Progress, set[int]], asked: tuple[int, int], node: str, since_ms: int
) -> None:
    progress, model = history
    live = progress.live
    added = progress.replay(Span(*asked, node, since_ms))
    adds = {at for span in added for at in range(span.first, span.past)}
    assert adds == {at for at in range(*asked) if at < live and at not in model}
    assert wanted(progress, HEAD) == model | adds
    assert progress.replay(Span(*asked, node, since_ms)) == [], "asked for again, it is sent once"
    if node or since_ms:
        assert whole(progress, HEAD) == model, "a replay is not counted as not confirmed"
        assert [at for at in range(live) if progress.lacks(at, at + 1)] == sorted(at for at in model if at < live)


@given(histories(), ends)
def test_a_replay_is_confirmed_by_itself(history: tuple[Progress, set[int]], asked: tuple[int, int]) -> None:
    progress, model = history
    for span in progress.replay(Span(*asked, "n1")):
        progress.confirm(Flight(span.first, span.past, span))
    assert wanted(progress, HEAD) == whole(progress, HEAD) == model


@given(histories(), ends)
def test_a_batch_is_partly_sent_where_an_edge_or_a_flight_is_inside(
    history: tuple[Progress, set[int]], batch: tuple[int, int]
) -> None:
    progress, model = history
    inside = set(range(*batch))
    if not progress.is_inside(*batch):
        assert inside <= model | set(range(progress.live, HEAD)) or not inside & model
    flight = replace(Flight(*batch), past=batch[0] + 1)
    progress.fly(flight.first, flight.past, None)
    assert progress.is_inside(*batch)


def test_live_readings_that_are_confirmed_out_of_turn_leave_a_history() -> None:
    progress = Progress(0)
    first, second = progress.fly(0, 5, None), progress.fly(5, 9, None)
    progress.confirm(second)
    assert (progress.live, progress.spans) == (9, [Span(0, 5)])
    progress.confirm(first)
    assert (progress.live, progress.spans) == (9, [])
