"""What can go wrong, named for what the catcher should do.

FieldpostError
├── ConfigError     tell the person: every fault of the configuration, by path
├── Unreachable     wait and try again: the far side can't take anything now
├── Rejected        set aside: the far side will never take this message
├── Malformed       count and drop: what came from the network is not the protocol
└── SpoolFault      stop acknowledging: the disk did not keep what it was given
    └── SpoolBroken set the file aside: what is on the disk is not what was written
"""

from __future__ import annotations

from collections.abc import Sequence


class FieldpostError(Exception):
    """Any error that Fieldpost itself raises."""


class ConfigError(FieldpostError):
    """The configuration can't be used. `faults` has one sentence each, with its path."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = tuple(faults)


class Unreachable(FieldpostError):
    """The far side can't take anything now; nothing is lost, wait and try again.

    `nobody` answered at all (refused, no way there, no such name): trying again costs the line next to nothing.
    """

    def __init__(self, text: str, *, nobody: bool = False) -> None:
        super().__init__(text)
        self.nobody = nobody


class Rejected(FieldpostError):
    """The far side refused this message for good; the text is the far side's reason."""


class Malformed(FieldpostError):
    """A message from the network is not the protocol. `reason` is one of a few fixed words, to count by."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class SpoolFault(FieldpostError):
    """The spool could not be written; what was handed over counts as not kept."""


class SpoolBroken(SpoolFault):
    """The spool's file is damaged: set it aside, begin a new one, and take over what can be read."""
