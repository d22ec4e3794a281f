"""Every bug of the museum in a copy of the project, one at a time; each must make the tests fail.

python -m tests.mutations [--only NAME ...] [--jobs N] [--all]
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]

from mutations.catalogue import CATALOGUE, Mutation  # noqa: E402  # tests/ is no package that is installed
from mutations.trial import Outcome, Unfit, attempt, control, copied  # noqa: E402


def row(outcome: Outcome, *, every: bool) -> str:
    tests = outcome.caught_by if every else outcome.caught_by[:1]
    caught = ", ".join(test.rpartition("::")[2] for test in tests) or "**survived**"
    how = outcome.how[:120].replace("|", "\\|")
    return f"| {outcome.mutation.name} | {caught} | {how} | {outcome.seconds:.1f} |"


def main(chosen: Sequence[Mutation], jobs: int, whole: bool) -> int:
    began = time.monotonic()
    outcomes: list[Outcome] = []
    unfit: list[str] = []
    with copied() as source, ThreadPoolExecutor(jobs) as pool:  # copied once: somebody may work on the project
        control_s = control([test for mutation in chosen for test in mutation.caught_by], source)
        print(f"the tests that are to fail pass without any mutation ({control_s:.1f} s)", flush=True)
        trials = [pool.submit(attempt, mutation, source, whole=whole) for mutation in chosen]
        for number, trial in enumerate(as_completed(trials), 1):
            try:
                outcomes.append(trial.result())
                print(f"{number:3}/{len(chosen)} {row(outcomes[-1], every=False)}", flush=True)
            except Unfit as error:
                unfit.append(str(error))
                print(f"{number:3}/{len(chosen)} {error}", flush=True)
    outcomes.sort(key=lambda outcome: chosen.index(outcome.mutation))
    survivors = [outcome.mutation.name for outcome in outcomes if outcome.survived]
    if len(chosen) == len(CATALOGUE) and not unfit:
        (HERE / "REPORT.md").write_text(report(outcomes, control_s, time.monotonic() - began, whole=whole))
    print(f"{len(outcomes) - len(survivors)} of {len(chosen)} caught; survived: {', '.join(survivors) or 'none'}")
    return 1 if survivors or unfit else 0


def report(outcomes: Sequence[Outcome], control_s: float, took_s: float, *, whole: bool) -> str:
    survivors = sum(outcome.survived for outcome in outcomes)
    ran = "The whole quick part ran on each" if whole else "On each ran the tests that are known to see it"
    return f"""# The museum of other systems' bugs, in our own source

{time.strftime("%Y-%m-%d %H:%M")}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, Python {
        platform.python_version()
    }. Written by `make prove` (`python -m tests.mutations`): {len(outcomes)}
mutations, **{survivors} survived**, {took_s:.0f} s in all. {ran}, in a copy of the project;
without any mutation the same tests pass there ({control_s:.1f} s). Every run made sure that it had imported the copy,
also in a process that it started. `catalogue.py` has the texts, and where each bug is known from.

| mutation | caught by | with | s |
|---|---|---|---|
""" + "".join(f"{row(outcome, every=whole)}\n" for outcome in outcomes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[mutation.name for mutation in CATALOGUE])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--all", action="store_true", help="run the whole quick part on each")
    asked = parser.parse_args()
    wanted = [mutation for mutation in CATALOGUE if not asked.only or mutation.name in asked.only]
    try:
        sys.exit(main(wanted, asked.jobs, asked.all))
    except Unfit as error:
        sys.exit(str(error))
