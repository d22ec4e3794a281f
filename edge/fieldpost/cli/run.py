"""`fieldpost run`: the gateway in the foreground, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from pathlib import Path

import click

from .. import gateway
from ..config import Config, load
from . import options


@click.command("run")
@options.config
@click.option("--verbose", is_flag=True, help="Log details of each step.")
def command(config_path: Path | None, verbose: bool) -> None:
    """Run the gateway: carry readings from the nodes to the uplinks.

    It starts without the internet and without a set clock, and ends on SIGTERM or Ctrl-C after what it holds in
    memory is on the card.

    \b
    Examples:
      fieldpost run --config gateway.toml
    """
    config = load(options.config_file(config_path))
    log_to_stderr(logging.DEBUG if verbose else logging.INFO)
    asyncio.run(_until_told(config))


async def _until_told(config: Config) -> None:
    """The one place where a signal becomes a cancellation."""
    task = asyncio.ensure_future(gateway.run(config))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task


def log_to_stderr(level: int) -> None:
    """Lines with a time of their own, or with the journal's priorities where the journal adds the time."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Journal() if "JOURNAL_STREAM" in os.environ else logging.Formatter(_LINE, "%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("fieldpost").setLevel(level)
    for noisy in ("pika", "mqtt", "paho"):  # what happens to a connection is told by us, once
        logging.getLogger(noisy).setLevel(logging.CRITICAL)


_LINE = "%(asctime)s %(levelname)-7s %(message)s"


_PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class _Journal(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"<{_PRIORITIES.get(record.levelno, 6)}>{record.getMessage()}"
