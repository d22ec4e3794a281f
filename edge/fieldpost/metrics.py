"""The gateway's figures under names, for whoever draws or watches them: `fieldpost status --metrics`.

Plain values made of the answer to `status`, in the text form that Prometheus reads (exposition format 0.0.4).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Metric:
    """One value. Names end with their unit, counters with `_total`; what is not known is left out."""

    name: str
    value: float
    help: str
    labels: dict[str, str] = field(default_factory=dict)


SPOOL = (
    ("spool_stored_readings", "stored", "readings on the card, delivered ones that are kept included"),
    ("spool_in_memory_readings", "in_memory", "readings that are not on the card"),
    ("spool_bytes", "bytes", "of the spool's file"),
    ("spool_max_bytes", "max_bytes", "where something is given up"),
    ("disk_free_bytes", "free_bytes", "of the disk"),
    ("spool_commits_total", "commits", "transactions since the start"),
    ("readings_taken_total", "taken", "new readings since the start"),
    ("readings_repeated_total", "repeats", "recognised by their identity and left out"),
    ("set_aside_readings", "set_aside", "refused by a far side for good"),
    ("readings_per_hour", "readings_per_hour", "taken, over the last hour"),
    ("spool_bytes_per_reading", "bytes_per_reading", "of what is stored"),
    ("spool_hours_until_full", "hours_until_full", "if no uplink confirmed anything from now on"),
    ("card_written_bytes_total", "card_bytes", "by the gateway since its start, without the file system's journal"),
    ("card_written_bytes_per_reading", "card_bytes_per_reading", "over the last hour"),
    ("card_written_bytes_per_day", "card_bytes_per_day", "at the last hour's rate"),
    ("card_life_years", "card_life_years", "an estimate: 500 cycles a cell, amplified four times"),
)

ROUTE = (
    ("route_backlog_readings", "backlog", "not confirmed yet"),
    ("route_backfill_readings", "backfill", "of them, left by outages"),
    ("route_backlog_bytes", "backlog_bytes", "of them, on the card"),
    ("route_oldest_age_seconds", "lag_s", "age of the oldest that is not confirmed"),
    ("route_drain_minutes", "drain_min", "until nothing waits, at the present rate beyond what comes in"),
    ("route_rate_readings_per_second", "rate", "confirmed, over the last half minute"),
    ("route_confirmed_total", "confirmed", "readings"),
    ("route_sent_bytes_total", "bytes", "of message bodies"),
    ("route_set_aside_total", "set_aside", "readings"),
)


def metrics(status: Mapping[str, Any]) -> Iterator[Metric]:
    """Every figure of an answer to `status`."""
    spool = status["spool"]
    for name, key, meaning in SPOOL:
        if spool.get(key) is not None:
            yield Metric(f"fieldpost_{name}", float(spool[key]), meaning)
    yield Metric("fieldpost_spool_ok", float(spool["state"] == "ok"), "1 while it takes readings")
    for why, count in sorted(spool["ledger"].items()):
        yield Metric("fieldpost_ledger_entries_total", float(count), "discards and gaps", {"why": why})
    for route in status["routes"]:
        labels = {"route": route["id"], "uplink": route["uplink"]}
        for name, key, meaning in ROUTE:
            if route.get(key) is not None:
                yield Metric(f"fieldpost_{name}", float(route[key]), meaning, labels)
        yield Metric("fieldpost_uplink_up", float(route["state"] == "up"), "1 while it is", labels)
    for reason, count in sorted(status["intake"]["rejected"].items()):
        yield Metric("fieldpost_rejected_total", float(count), "messages that are not the protocol", {"reason": reason})
    for node in status["nodes"]:
        labels = {"node": node["node"]}
        yield Metric("fieldpost_node_up", float(node["state"] in ("up", "sleep")), "1 while it is", labels)
        yield Metric("fieldpost_node_missing_readings", float(node["missing"]), "given up by it", labels)


def text(values: Iterator[Metric]) -> str:
    """The exposition format: a name's help once, then its values."""
    by_name: dict[str, list[Metric]] = {}
    for metric in values:
        by_name.setdefault(metric.name, []).append(metric)
    lines = []
    for name, group in by_name.items():
        kind = "counter" if name.endswith("_total") else "gauge"
        lines += [f"# HELP {name} {group[0].help}", f"# TYPE {name} {kind}"]
        for metric in group:
            labels = ",".join(f'{key}="{_escaped(value)}"' for key, value in metric.labels.items())
            lines.append(f"{name}{{{labels}}} {_number(metric.value)}" if labels else f"{name} {_number(metric.value)}")
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    """To the last digit: a counter that is rounded stands still, and then jumps."""
    return str(int(value)) if value == int(value) else repr(value)


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
