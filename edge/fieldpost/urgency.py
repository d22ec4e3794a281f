"""Which readings are urgent: they overtake all others, on the card and upstream. Decided once, at intake."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .reading import Manifest, Value


@dataclass(frozen=True, slots=True)
class UrgentRule:
    """A channel of the nodes that a pattern names, above or below a value in the channel's own unit.

    A failed read of the channel is urgent too where `failed` is set.
    """

    node: str = "*"
    channel: str = ""
    above: float | None = None
    below: float | None = None
    failed: bool = False


class Urgency:
    """All rules, looked up by node and manifest once."""

    def __init__(self, rules: Sequence[UrgentRule]) -> None:
        self._rules = tuple(rules)
        self._columns: dict[tuple[str, str], list[tuple[int, float, UrgentRule]]] = {}

    def concerns(self, node: str) -> bool:
        """Whether any rule names this node."""
        return any(fnmatchcase(node, rule.node) for rule in self._rules)

    def is_urgent(self, node: str, manifest: Manifest, row: Sequence[Value]) -> bool:
        """Whether a row of scaled values is one of those."""
        for column, scale, rule in self._of(node, manifest):
            value = row[column] if column < len(row) else None
            if isinstance(value, int):
                if rule.above is not None and value / scale > rule.above:
                    return True
                if rule.below is not None and value / scale < rule.below:
                    return True
            elif isinstance(value, str) and rule.failed:
                return True
        return False

    def _of(self, node: str, manifest: Manifest) -> list[tuple[int, float, UrgentRule]]:
        key = (node, manifest.hash)
        if key not in self._columns:
            if len(self._columns) > 1000:
                self._columns.clear()
            self._columns[key] = [
                (number, channel.scale, rule)
                for number, channel in enumerate(manifest.channels)
                for rule in self._rules
                if fnmatchcase(node, rule.node) and channel.name == rule.channel
            ]
        return self._columns[key]
