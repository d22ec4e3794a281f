"""The door for the command line: a unix socket, one JSON request and one JSON answer a line.

A verb that concerns a running gateway comes through here; none opens its database.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from .errors import FieldpostError, SpoolFault, Unreachable

log = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 65_536
TIMEOUT_S = 10.0

Verb = Callable[[dict[str, Any]], Awaitable[Any]]


@asynccontextmanager
async def open_control(path: Path, verbs: dict[str, Verb]) -> AsyncIterator[None]:
    """Answer `verbs` on the socket `path` (mode 0660) while the block runs. Raises SpoolFault where it can't."""
    try:
        _clear(path)
        server = await asyncio.start_unix_server(lambda r, w: _serve(r, w, verbs), path, limit=MAX_REQUEST_BYTES)
        path.chmod(0o660)
    except OSError as error:
        raise SpoolFault(f"{path}: {error}; name another place as gateway.control") from error
    try:
        yield
    finally:
        server.close()
        path.unlink(missing_ok=True)


def _clear(path: Path) -> None:
    """Make room for our socket: one that nobody listens on was left by a killed gateway."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise OSError(f"{path} is there already and is no socket")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink()
            return
    raise OSError("another gateway listens here")


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, verbs: dict[str, Verb]) -> None:
    try:
        while line := await reader.readline():
            writer.write(msgspec.json.encode(await _answer(line, verbs)) + b"\n")
            await writer.drain()
    except (ConnectionError, ValueError) as error:  # ValueError: a line beyond the limit
        log.debug("control: %s", error)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def _answer(line: bytes, verbs: dict[str, Verb]) -> dict[str, Any]:
    try:
        request = msgspec.json.decode(line, type=dict[str, Any])
        verb = verbs.get(str(request.get("verb")))
        if verb is None:
            return {"ok": False, "error": f"no such verb; there are: {', '.join(sorted(verbs))}"}
        return {"ok": True, "answer": await verb(request)}
    except (msgspec.MsgspecError, FieldpostError) as error:
        return {"ok": False, "error": str(error)}


def ask(path: Path, verb: str, *, timeout_s: float = TIMEOUT_S, **request: Any) -> Any:
    """Ask a running gateway. Raises Unreachable, with what to do, where none answers or it can't comply."""
    try:
        with socket.socket(socket.AF_UNIX) as door:
            door.settimeout(timeout_s)
            door.connect(str(path))
            door.sendall(msgspec.json.encode({"verb": verb, **request}) + b"\n")
            with door.makefile("rb") as answers:
                answer = msgspec.json.decode(answers.readline())
    except PermissionError:
        raise Unreachable(f"{path}: not permitted; try sudo, or join the gateway's group") from None
    except (OSError, msgspec.MsgspecError) as error:
        raise Unreachable(
            f"no gateway answers at {path} ({error}); start one with `fieldpost run`", nobody=True
        ) from None
    if not answer["ok"]:
        raise Unreachable(answer["error"])
    return answer["answer"]
