"""Fieldpost's command line, and at its end a file that says where its main thread spent the processor's time.

    python tests/bench/sampled.py OUT run --config gateway.toml

The kernel's profiling timer interrupts it every few ms of processor time (of all its threads); what Python stands at
then is counted, so it costs little and a call into C counts for whoever made it.
"""

from __future__ import annotations

import atexit
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from types import FrameType

EVERY_S = 0.002
OURS = ("fieldpost", "spool", "forms", "uplinks", "nodes")


def sample(out: Path) -> None:
    """Count from now on, and write `out` when the process ends."""
    own: Counter[str] = Counter()
    below: Counter[str] = Counter()

    def take(_: int, frame: FrameType | None) -> None:
        met = set()
        if frame is not None:
            own[_name(frame)] += 1
        while frame is not None:
            met.add(_name(frame))
            frame = frame.f_back
        below.update(met)

    def write() -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        total = sum(own.values()) or 1
        ours = Counter({name: count for name, count in below.items() if name.split("/")[0] in OURS})
        lines = [f"{total} samples, {time.process_time():.1f} s of processor time", "  own  with calls  where"]
        for name, _ in [*own.most_common(10), ("", 0), *ours.most_common(20)]:
            share = f"{100 * own[name] / total:4.1f}%      {100 * below[name] / total:5.1f}%  {name}"
            lines.append(share if name else "of Fieldpost, by what they take with their calls:")
        out.write_text("\n".join(lines) + "\n")

    signal.signal(signal.SIGPROF, take)
    signal.siginterrupt(signal.SIGPROF, False)
    signal.setitimer(signal.ITIMER_PROF, EVERY_S, EVERY_S)
    atexit.register(write)


def _name(frame: FrameType) -> str:
    code = frame.f_code
    parts = Path(code.co_filename).parts
    return f"{'/'.join(parts[-2:])} {code.co_qualname}"


if __name__ == "__main__":
    out = Path(sys.argv.pop(1))
    del sys.path[0]  # this folder's modules are not fieldpost's
    sample(out)
    from fieldpost.cli import main

    main()
