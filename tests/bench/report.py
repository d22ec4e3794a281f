"""RESULTS.md: a section a topic, with its own date and machine; a topic that is not run again keeps its section."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HEAD = """\
# What it costs and how fast it is

Written by `python -m tests.bench [TOPIC ...] [--quick]` (`make prove` runs all of it); each section says when and on
what machine. Load generator, all brokers and the far side share that machine, so read the ratios. "To reach" are the
figures that the spool was built for; what is missed shows where the time goes.
"""

QUICK = "A quick run, not for the record."


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure that was seen, and the bound that it is to keep: `most` or `least`, or neither.

    `beside`: what others do, in the same run or by the source that it names.
    """

    what: str
    seen: float
    unit: str
    most: float | None = None
    least: float | None = None
    beside: str = ""

    @property
    def reached(self) -> bool:
        """Whether it keeps its bounds."""
        return (self.most is None or self.seen <= self.most) and (self.least is None or self.seen >= self.least)

    def row(self) -> tuple[str, ...]:
        """As a row of the table."""
        bound = f"<= {number(self.most)}" if self.most is not None else ""
        bound = f">= {number(self.least)}" if self.least is not None else bound
        verdict = ("reached" if self.reached else "**missed**") if bound else ""
        return self.what, bound, f"{number(self.seen)} {self.unit}".strip(), verdict, self.beside


def number(value: float) -> str:
    """Three figures that count, with thousands apart: 12,345  123  12.3  1.23  0.012."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:,.1f}"
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table; columns that are empty all the way down are left out."""
    rows = [list(row) for row in rows]
    kept = [n for n in range(len(head)) if n == 0 or any(row[n] for row in rows)]
    lines = ["| " + " | ".join(head[n] for n in kept) + " |", "|" + "---|" * len(kept)]
    return lines + ["| " + " | ".join(row[n] for n in kept) + " |" for row in rows]


def figures(seen: Iterable[Figure]) -> list[str]:
    """Lines of the table of figures."""
    return table(("Figure", "To reach", "Seen", "", "Beside it"), [figure.row() for figure in seen])


def prose(text: str) -> list[str]:
    """Lines of a paragraph."""
    return textwrap.wrap(" ".join(text.split()), 118, break_long_words=False, break_on_hyphens=False)


def machine() -> str:
    """The machine and the versions that figures were seen with."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    said = subprocess.run(["/usr/sbin/mosquitto", "-h"], capture_output=True, text=True).stdout.split("\n")[0]
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return (
        f"{os.cpu_count()} cores of {model[1] if model else platform.machine()}, {platform.system()} "
        f"{platform.release()}, Python {platform.python_version()}, {said}, Fieldpost at {commit or 'no commit'}"
    )


def section(topic: str, title: str, body: Sequence[str], remark: str = "") -> str:
    """A topic's section. `remark`: what else to say of the run."""
    busy = f"The machine's load average at its end: {os.getloadavg()[1]:.1f} (of 5 minutes)."
    head = f"{time.strftime('%Y-%m-%d %H:%M')}, {machine()}. {busy}{' ' + remark if remark else ''}"
    return "\n".join([f"## {topic}: {title}", "", *prose(head), "", *body]).rstrip() + "\n"


def sections(text: str) -> dict[str, str]:
    """The sections of a report by topic."""
    found: dict[str, str] = {}
    for part in re.split(r"^(?=## )", text, flags=re.MULTILINE)[1:]:
        topic = re.match(r"## ([a-z]+): ", part)
        if topic:
            found[topic[1]] = part.rstrip() + "\n"
    return found


def put(path: Path, topics: Sequence[str], fresh: Mapping[str, str]) -> None:
    """Write the report: fresh sections in the place of old ones, in the order of `topics`."""
    kept = sections(path.read_text()) if path.exists() else {}
    kept.update(fresh)
    path.write_text("\n".join([HEAD, *(kept[topic] for topic in topics if topic in kept)]))
