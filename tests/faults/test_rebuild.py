"""The power goes while a damaged spool is taken over into a new file: what can be read is there all the same.

`python -m faults.test_rebuild FOLDER TRACE closed|killed` is the process that is recorded.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fieldpost.spool.database import PAGE_BYTES
from fieldpost.spool.log import Log
from fieldpost.spool.stage import LaneName
from fieldpost.spool.wal import FRAME_BYTES, HEADER_BYTES
from spools import readings, spool_in

from faults.crash import scratch
from faults.recording import Call, Disk, Event, lay_out, read_trace, recorder
from faults.workload import say

ROWS = 60


async def fill(folder: Path, *, killed: bool) -> None:
    async with spool_in(folder) as spool:
        for first in range(0, ROWS, 10):
            await spool.until_safe(spool.append(readings(first, first + 10)))
        if killed:
            os._exit(0)  # everything is in the write-ahead log still


def live(folder: Path, *, killed: bool) -> None:
    """A spool with some batches, of whose file, or of whose log, the first page is lost then; and its next opening."""
    pid = os.fork()
    if pid == 0:
        asyncio.run(fill(folder, killed=killed))
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    say(ended=True)
    with (folder / ("spool.db-wal" if killed else "spool.db")).open("r+b") as file:
        file.seek(HEADER_BYTES + FRAME_BYTES if killed else 0)
        file.write(bytes(PAGE_BYTES))
        file.flush()
        os.fsync(file.fileno())
    say(damaged=True)
    log = Log(folder)
    assert log.open().aside
    log.close()


def recorded(folder: Path, how: str) -> list[Event]:
    here = Path(__file__).parent.parent
    (folder / "root").mkdir()
    subprocess.run(
        [sys.executable, "-W", "error", "-m", "faults.test_rebuild", folder / "root", folder / "trace", how],
        env=os.environ
        | {"LD_PRELOAD": str(recorder()), "PYTHONPATH": os.pathsep.join([str(here), str(here.parent / "edge")])},
        check=True,
        capture_output=True,
    )
    return read_trace(folder / "trace")


def stored(folder: Path) -> list[int]:
    log = Log(folder)
    log.open()
    try:
        infos = log.infos(LaneName.BULK, 0, limit=-1)
        return [one.seq for info in infos for one in log.read(info.lane, info.first, info.past, info.count).readings]
    finally:
        log.close()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["closed", "killed"])
def test_a_power_cut_while_a_damaged_file_is_taken_over_loses_none_of_it(how: str) -> None:
    chance, opened = random.Random(7), 0
    with scratch() as folder:
        events, disk, is_damaged = recorded(folder, how), Disk(), False
        for number, event in enumerate(events):
            disk.feed(event)
            is_damaged |= event.call is Call.MARK and "damaged" in event.said
            if not is_damaged or event.call is Call.CLOSE:
                continue
            for image in disk.images(chance, 2):
                shutil.rmtree(folder / "image", ignore_errors=True)
                (folder / "image").mkdir()
                lay_out(image, folder / "image")
                assert stored(folder / "image" / "spool") == list(range(ROWS)), (number, event.call, image.how)
                opened += 1
    assert is_damaged and opened > 100


if __name__ == "__main__":
    recorder_ = ctypes.CDLL(None)
    recorder_.recorder_begin(sys.argv[1].encode(), sys.argv[2].encode())
    live(Path(sys.argv[1]) / "spool", killed=sys.argv[3] == "killed")
    recorder_.recorder_begin(b"", b"")
