"""The benchmarks.

    python -m tests.bench [TOPIC ...] [--quick]

writes each topic's section into RESULTS.md beside this file, and its plots; a topic that is not run keeps its section.
Topics that count what reaches a disk or a line make loop devices and listen to packets, so they need root.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
import traceback
from pathlib import Path

from . import backlog, card, drain, farm, rate, report

HERE = Path(__file__).parent
TOPICS = {"farm": farm, "card": card, "rate": rate, "backlog": backlog, "drain": drain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("topics", nargs="*", metavar="TOPIC", help=f"of: {', '.join(TOPICS)}; all, when left out")
    parser.add_argument("--quick", action="store_true", help="smaller runs: to see that it works, not for the record")
    parser.add_argument("--print", action="store_true", dest="only_print", help="leave RESULTS.md as it is")
    arguments = parser.parse_args()
    if unknown := set(arguments.topics) - set(TOPICS):
        parser.error(f"no topic {', '.join(sorted(unknown))}; there are: {', '.join(TOPICS)}")
    # Loop devices are undone in `finally`, which a signal alone would not run.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end"))
    failed = []
    for topic in arguments.topics or TOPICS:
        began = time.monotonic()
        print(f"{topic} ...", file=sys.stderr)
        try:
            text = asyncio.run(TOPICS[topic].run(arguments.quick))
        except Exception:  # the other topics' figures are worth having all the same
            traceback.print_exc()
            failed.append(topic)
            continue
        print(f"{topic}: {time.monotonic() - began:.0f} s", file=sys.stderr)
        print(text)
        if not arguments.only_print:
            report.put(HERE / "RESULTS.md", list(TOPICS), {topic: text})
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
