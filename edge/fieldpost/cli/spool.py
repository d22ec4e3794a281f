"""`fieldpost spool`: what is stored, whether it is whole, and what to do with what far sides refused."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import click
import msgspec

from ..config import Config, load
from ..control import ask
from ..errors import SpoolFault, Unreachable
from ..gateway import route_terms, spool_settings
from ..spool import Spool
from ..spool.log import Log
from ..spool.repair import Report
from ..spool.rows import Opened
from ..spool.stage import LaneName
from . import options


@click.group("spool")
def command() -> None:
    """Look at the stored readings, check them, take them out, repair the file.

    \b
    Examples:
      fieldpost spool status
      fieldpost spool verify
      fieldpost spool export --output readings.jsonl
      fieldpost spool set-aside list
    """


@command.command("status")
@options.config
@options.as_json
def status_(config_path: Path | None, as_json: bool) -> None:
    """Show what is stored and how long there is room; also while no gateway runs.

    \b
    Examples:
      fieldpost spool status
      fieldpost spool status --json
    """
    try:
        answer = ask(options.control_socket(config_path), "status")["spool"]
    except Unreachable as away:
        if not away.nobody:
            raise
        answer = _offline(config_path, _look)
    if as_json:
        click.echo(json.dumps(answer))
        return
    for line in lines(answer):
        click.echo(_fitted(line))


def _fitted(line: str) -> str:
    """A line as wide as the terminal at the most, where there is one; what is left hangs under its second column."""
    if not sys.stdout.isatty():
        return line
    columns = shutil.get_terminal_size().columns
    return textwrap.fill(line, columns, subsequent_indent=" " * 13, break_on_hyphens=False)


def lines(spool: dict[str, Any]) -> Iterator[str]:
    """The figures, one a line."""
    from .status import age

    yield f"state        {spool['state']}{': ' + spool['detail'] if spool.get('detail') else ''}"
    most = f" of {spool['max_bytes'] / 1e6:,.0f} MB" if spool["max_bytes"] else ""
    yield f"stored       {spool['stored']:,} readings, {spool['bytes'] / 1e6:.1f} MB{most}"
    for route, waiting in sorted(spool["routes"].items()):
        count = waiting["urgent"] + waiting["live"] + waiting["backfill"]
        parts = f"{waiting['urgent']} urgent, {waiting['live']} live, {waiting['backfill']} backfill"
        old = waiting["oldest_ms"]
        oldest = f", oldest {age(max(0.0, time.time() - old / 1000))}" if old and count else ""
        size = f"{waiting['bytes'] / 1e6:.1f} MB"
        yield f"waiting      {route or 'no route'}: {count:,} readings ({parts}), {size}{oldest}"
    for route, count in sorted(spool["removed"].items()):
        yield f"waiting      {route}: {count:,} readings; the route is not configured any more, they are kept for it"
    if spool.get("hours_until_full") is not None:
        yield f"full in      {age(spool['hours_until_full'] * 3600)} without any uplink, at the last hour's rate"
    if spool.get("card_bytes_per_reading") is not None:
        life = spool.get("card_life_years")
        years = f"; a plain card bears that for {life:,.0f} years (estimate)" if life else ""
        yield f"card         {spool['card_bytes_per_reading']:.0f} bytes written per reading{years}"
    yield f"set aside    {spool['set_aside']} readings" + (
        " (fieldpost spool set-aside list)" if spool["set_aside"] else ""
    )
    for why, count in sorted(spool["ledger"].items()):
        yield f"ledger       {count} x {why}"


@command.command("verify")
@options.config
@options.as_json
def verify_(config_path: Path | None, as_json: bool) -> None:
    """Compare everything that is stored with its checksums. Ends with 1 where something is damaged.

    Safe while the gateway runs: that one does it then, between its commits.

    \b
    Examples:
      fieldpost spool verify
      fieldpost spool verify --json
    """
    try:
        answer = ask(options.control_socket(config_path), "verify", timeout_s=3600)
    except Unreachable as away:
        if not away.nobody:
            raise
        answer = _offline(config_path, _verify)
    if as_json:
        click.echo(json.dumps(answer))
    else:
        click.echo(
            f"{answer['readings']:,} readings in {answer['batches']:,} batches, {answer['entries']:,} entries, "
            f"structure {answer['structure']}"
        )
        for place in answer["damaged"]:
            click.echo(f"  damaged: {place}")
        if answer["set_aside_rows"]:
            click.echo(f"  damaged rows that were set aside earlier: {answer['set_aside_rows']}")
        click.echo("all is whole" if answer["is_whole"] else "stop the gateway, then `fieldpost spool repair`")
    if not answer["is_whole"]:
        sys.exit(1)


@command.command("export")
@options.config
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="A file.  [default: standard output]")
def export(config_path: Path | None, output: Path | None) -> None:
    """Write every stored reading as one line of JSON each; also while the gateway runs.

    \b
    Examples:
      fieldpost spool export --output readings.jsonl
      fieldpost spool export | jq 'select(.node == "greenhouse-1")'
    """
    if output is None:
        _export(config_path, sys.stdout)
        return
    part = output.with_name(output.name + ".part")
    with part.open("w") as file:
        count = _export(config_path, file)
    part.rename(output)
    click.echo(f"{count:,} readings in {output}")


def _export(config_path: Path | None, file: TextIO) -> int:
    socket = options.control_socket(config_path)
    try:
        ask(socket, "page", lane=0, position=0)
    except Unreachable as away:
        if not away.nobody:
            raise
        return int(_offline(config_path, lambda log, opened: _export_offline(log, opened, file)))
    return _write_pages(
        file, lambda lane, position: ask(socket, "page", lane=int(lane), position=position, timeout_s=60)
    )


def _export_offline(log: Log, opened: Opened, file: TextIO) -> int:
    from ..gateway import PAGE_READINGS, as_json

    manifests = {manifest.hash: manifest for manifest in opened.manifests}

    def page(lane: LaneName, position: int) -> dict[str, Any]:
        for info in log.infos(lane, position, limit=3, covering=True) or log.infos(lane, position, limit=-1):
            if info.past > position:
                start = max(position, info.first)
                piece = log.read(lane, start, info.past, PAGE_READINGS)
                readings = [as_json(reading, manifests) for reading in piece.readings]
                return {"readings": readings, "next": max(piece.past, start + 1)}
        return {"readings": [], "next": None}

    return _write_pages(file, page)


def _write_pages(file: TextIO, page: Callable[[LaneName, int], dict[str, Any]]) -> int:
    count = 0
    for lane in LaneName:
        position: int | None = 0
        while position is not None:
            answer = page(lane, position)
            for reading in answer["readings"]:
                file.write(json.dumps(reading) + "\n")
            count += len(answer["readings"])
            position = answer["next"]
            if file is not sys.stdout and sys.stderr.isatty():
                click.echo(f"\r{count:,} readings", nl=False, err=True)
    if file is not sys.stdout and sys.stderr.isatty():
        click.echo(err=True)
    return count


@command.command("repair")
@options.config
@options.as_json
def repair(config_path: Path | None, as_json: bool) -> None:
    """Check a stopped gateway's file; where it is damaged, set it aside and take what can be read into a new one.

    Nothing is deleted, and what is lost goes into the ledger and upstream. The gateway does the same by itself when it
    meets damage that it can't step over.

    \b
    Examples:
      systemctl stop fieldpost && fieldpost spool repair && systemctl start fieldpost
    """

    config = load(options.config_file(config_path))
    _stored(config)
    before = set(config.data.glob("spool.damaged-*"))
    with _quiet():
        report = asyncio.run(_repair(config))
    aside = sorted(str(path) for path in set(config.data.glob("spool.damaged-*.db")) - before)
    answer: dict[str, Any] = {"repaired": bool(aside), "aside": aside, "after": _report(report)}
    if as_json:
        click.echo(json.dumps(answer))
    elif not answer["repaired"]:
        click.echo(f"all is whole: {answer['after']['readings']:,} readings; nothing was changed")
    else:
        for aside in answer["aside"]:
            click.echo(f"set aside: {aside}")
        click.echo(f"{answer['after']['readings']:,} readings were taken over; start the gateway again")


@command.group("set-aside")
def set_aside() -> None:
    """Readings that a far side refused for good: list them, try them again, or drop them.

    \b
    Examples:
      fieldpost spool set-aside list
      fieldpost spool set-aside retry 3 4
      fieldpost spool set-aside drop --all
    """


@set_aside.command("list")
@options.config
@options.as_json
def list_(config_path: Path | None, as_json: bool) -> None:
    """Show each, with the far side's reason.

    \b
    Examples:
      fieldpost spool set-aside list --json
    """
    _set_aside(config_path, as_json, "list", ())


@set_aside.command("retry")
@options.config
@options.as_json
@click.argument("ids", nargs=-1, type=int)
@click.option("--all", "everything", is_flag=True, help="All of them.")
def retry(config_path: Path | None, as_json: bool, ids: tuple[int, ...], everything: bool) -> None:
    """Send them to the same uplink again; what is refused again stays.

    \b
    Examples:
      fieldpost spool set-aside retry 3 4
      fieldpost spool set-aside retry --all
    """
    _set_aside(config_path, as_json, "retry", _chosen(ids, everything))


@set_aside.command("drop")
@options.config
@options.as_json
@click.argument("ids", nargs=-1, type=int)
@click.option("--all", "everything", is_flag=True, help="All of them.")
def drop(config_path: Path | None, as_json: bool, ids: tuple[int, ...], everything: bool) -> None:
    """Give them up for good; the ledger says so.

    \b
    Examples:
      fieldpost spool set-aside drop 3
    """
    _set_aside(config_path, as_json, "drop", _chosen(ids, everything))


def _chosen(ids: tuple[int, ...], everything: bool) -> tuple[int, ...]:
    if bool(ids) == everything:
        raise click.UsageError("name ids from `fieldpost spool set-aside list`, or --all")
    return ids


def _set_aside(config_path: Path | None, as_json: bool, do: str, ids: tuple[int, ...]) -> None:
    answer = ask(options.control_socket(config_path), "set-aside", do=do, ids=list(ids), timeout_s=600)
    if as_json:
        click.echo(json.dumps(answer))
        return
    for one in answer:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["at_ms"] / 1000))
        click.echo(f"{one['id']:>5}  {at}  {one['route']}  {one['reading']['id']}  {one['outcome'] or one['reason']}")
    missing = sorted(set(ids) - {one["id"] for one in answer})
    if missing:
        raise SpoolFault(f"not set aside: {', '.join(map(str, missing))}; look with `fieldpost spool set-aside list`")
    if not answer:
        click.echo("nothing is set aside")


async def _repair(config: Config) -> Report:
    """Open the spool as the gateway does, which sets aside what it can't open, then look at every row."""
    async with Spool(spool_settings(config), route_terms(config)) as spool:
        report = await spool.verify()
        if not report.is_whole:
            await spool.repair("; ".join([report.structure, *report.damaged])[:120])
            report = await spool.verify()
        return report


def _offline(config_path: Path | None, work: Callable[[Log, Opened], Any]) -> Any:
    """Look at a copy of the file of a gateway that does not run: whatever is met in it, the file stays as it is.

    Raises SpoolFault where a gateway runs, or there is no room for the copy.
    """
    config = load(options.config_file(config_path))
    file = _stored(config)
    with _alone(config.data), tempfile.TemporaryDirectory(prefix="fieldpost-") as name:
        try:
            for suffix in ("", "-wal"):
                source = file.with_name(file.name + suffix)
                if source.is_file():
                    shutil.copyfile(source, Path(name) / source.name)
        except OSError as error:
            raise SpoolFault(f"{file} can't be copied to be looked at: {error}; name a folder as TMPDIR") from error
        log = Log(Path(name))
        with _quiet():
            opened = log.open()
            try:
                return work(log, opened)
            finally:
                log.close()


def _stored(config: Config) -> Path:
    file = config.data / "spool.db"
    if not file.exists():
        raise SpoolFault(f"{file}: there is none; a gateway makes it when it first runs")
    return file


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep a gateway from starting meanwhile. Raises SpoolFault where one runs."""
    try:
        with (folder / "spool.lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            yield
    except FileNotFoundError:
        yield
    except BlockingIOError:
        raise SpoolFault(f"{folder}: a gateway has this spool open; end it first (systemctl stop fieldpost)") from None
    except PermissionError as error:
        raise SpoolFault(f"{error}; run this as the gateway's user, or with sudo") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What we do to a copy is not news."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _verify(log: Log, opened: Opened) -> dict[str, Any]:
    report = log.verify(_tell)
    report.damaged += [why.partition(": ")[2] for why in opened.aside]  # of the copy, which was begun anew by `open`
    return _report(report)


def _look(log: Log, opened: Opened) -> dict[str, Any]:
    infos = {lane: log.infos(lane, 0, limit=-1) for lane in LaneName}
    routes: dict[str, dict[str, Any]] = {}
    for (route, lane), (live, spans) in opened.progress.items():
        shown = routes.setdefault(route, {"urgent": 0, "live": 0, "backfill": 0, "bytes": 0, "oldest_ms": None})
        fresh = opened.heads[lane] - live if live is not None else 0
        history = sum(span.past - span.first for span in spans)
        if lane is LaneName.URGENT:
            shown["urgent"] += fresh + history
        else:
            shown["live"] += fresh
            shown["backfill"] += history
    return {
        "state": "stopped",
        "stored": sum(info.count for lane in infos.values() for info in lane),
        "bytes": log.used_bytes(),
        "max_bytes": 0,
        "routes": routes,
        "removed": {},
        "set_aside": opened.set_aside,
        "ledger": opened.counts,
    }


def _report(report: Report) -> dict[str, Any]:
    answer: dict[str, Any] = msgspec.to_builtins(report)
    return answer | {"is_whole": report.is_whole}


def _tell(done: int, of: int) -> None:
    if sys.stderr.isatty():
        click.echo(f"\r{done:,} of {of:,} batches", nl=done >= of, err=True)
