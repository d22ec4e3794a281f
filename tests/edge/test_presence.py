"""Who is there: changes only, no stale wills, two boards with one id."""

from __future__ import annotations

from fieldpost.nodes.presence import CONFLICT_SHOWN_MS, Presence
from fieldpost.reading import Event
from fieldpost.wire import State

A, B = "aaaaaaaaaaaa", "bbbbbbbbbbbb"


def up(install: str = A, boot: int = 1, connection: int = 1, uptime_ms: int = 0) -> State:
    return State("up", install, boot, connection, uptime_ms=uptime_ms)


def lost(install: str = A, boot: int = 1, connection: int = 1) -> State:
    return State("lost", install, boot, connection)


def test_a_change_is_told_once() -> None:
    presence = Presence()
    assert presence.take("n1", up(), 0, live=True) == Event("presence", "n1", A, 1, 1, None, "up")
    assert presence.take("n1", up(uptime_ms=5), 1, live=True) is None
    assert presence.take("n1", lost(), 2, live=True) == Event("presence", "n1", A, 1, 1, None, "lost")
    assert presence.take("n1", lost(), 3, live=True) is None


def test_a_will_older_than_the_newest_up_is_stale() -> None:
    presence = Presence()
    presence.take("n1", up(boot=2, connection=3), 0, live=True)
    for stale in (lost(boot=2, connection=2), lost(boot=1, connection=9), lost(install=B, boot=2, connection=3)):
        assert presence.take("n1", stale, 1, live=True) is None
    assert presence.nodes["n1"].st == "up"
    assert presence.stale_wills == 3
    assert presence.take("n1", lost(boot=2, connection=3), 2, live=True) is not None


def test_two_boards_with_one_id_are_named() -> None:
    presence = Presence()
    presence.take("n1", up(A), 0, live=True)
    presence.take("n1", up(B), 10, live=True)
    assert presence.conflict("n1", 10) == ""  # a board that was flashed again looks just like this
    presence.take("n1", up(A, connection=2), 20, live=True)
    assert presence.conflict("n1", 20) == f"two boards use the id n1: installs {A} and {B}"
    assert presence.conflict("n1", 20 + CONFLICT_SHOWN_MS) == ""


def test_two_boards_with_the_same_install_are_named() -> None:
    presence = Presence()
    presence.take("n1", up(A, 5, 1, 9000), 0, live=True)
    presence.take("n1", up(A, 3, 1, 400), 10, live=True)
    assert presence.conflict("n1", 10) == f"two boards use the id n1: both say that they are install {A}"


def test_a_retained_state_after_a_restart_is_no_conflict() -> None:
    presence = Presence()
    presence.take("n1", up(A, 5, 2, 9000), 0, live=True)
    presence.take("n1", up(A, 5, 2, 9000), 10, live=False)
    assert presence.conflict("n1", 10) == ""
