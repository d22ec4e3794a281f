"""The broker that the nodes speak to: a mosquitto configured by us, an embedded one, or somebody's own.

What the broker holds is in memory only, on purpose: nodes hold on to their readings until the gateway acknowledges
them, and the gateway publishes again what the broker should retain.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

import msgspec

from .config import BrokerConfig
from .errors import ConfigError, Unreachable
from .mqtt import Address
from .wire import MAX_PAYLOAD_BYTES, ROOT

log = logging.getLogger(__name__)

INTAKE, CONTROL = "gateway.intake", "gateway.control"
"""As whom the gateway's two connections come; a dot, which no node's name can have."""

MOSQUITTO = ("mosquitto", "/usr/sbin/mosquitto", "/usr/local/sbin/mosquitto")
STARTED_WITHIN_S = 10.0

ACL = f"""\
# Written by fieldpost; a node may write only its own leaves, one by one.
user {INTAKE}
topic readwrite {ROOT}/#
user {CONTROL}
topic readwrite {ROOT}/#

""" + "".join(
    f"pattern {way} {ROOT}/{topic}\n"
    for way, topics in {
        "write": ["%u/state", "%u/manifest", "%u/data", "%u/log", "%u/reply", "%u/file"],
        "read": ["%u/ack", "%u/config", "%u/cmd/+", "group/+/cmd/+", "gateway/state", "gateway/time", "file/+/+"],
    }.items()
    for topic in topics
)


class Broker(Protocol):
    """A running broker."""

    kind: str
    listens: str

    def address(self, user: str) -> Address:
        """How the gateway itself reaches it as `user` (INTAKE or CONTROL)."""

    async def admit(self, keys: Mapping[str, str]) -> None:
        """From now on let in the nodes of `keys` (name -> key), and no others."""


@asynccontextmanager
async def open_broker(config: BrokerConfig, folder: Path, keys: Mapping[str, str]) -> AsyncIterator[Broker]:
    """The broker of the configuration, running and letting in the nodes of `keys`; ended with the block.

    Raises Unreachable where it does not come up, ConfigError where it is not installed.
    """
    if config.kind == "external":
        log.info("broker: somebody's own at %s:%d; who may connect there is theirs to say", config.host, config.port)
        yield External(config)
        return
    broker = Mosquitto(config, folder) if config.kind == "mosquitto" else Embedded(config, folder)
    await broker.start(keys)
    watcher = asyncio.create_task(broker.keep_running(), name="broker")
    try:
        yield broker
    finally:
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher
        await broker.stop()


class External:
    """Somebody's own broker: we come as its user, and it knows our nodes."""

    kind = "external"

    def __init__(self, config: BrokerConfig) -> None:
        self._config = config
        self.listens = f"{config.host}:{config.port}"

    def address(self, user: str) -> Address:
        return Address(self._config.username, self._config.password, self._config.host, self._config.port)

    async def admit(self, keys: Mapping[str, str]) -> None:
        log.warning("the broker is not ours: add the node to it by hand")


class _Child:
    """A broker in a process of its own, started again when it dies."""

    kind = ""

    def __init__(self, config: BrokerConfig, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._config = config
        self._folder = folder
        self._pid = 0
        self._child: asyncio.subprocess.Process | None = None
        self._secrets = {user: _secret(folder / f"{user}.key") for user in (INTAKE, CONTROL)}
        self._keys: dict[str, str] = {}
        self.listens = f"{config.host}:{config.port}"

    async def start(self, keys: Mapping[str, str]) -> None:
        """Write the configuration and start. Raises Unreachable."""
        self._keys = dict(keys)
        self._configure()
        await self._spawn()

    async def keep_running(self) -> None:
        """Start the broker again whenever it has died; nodes and gateway come back by themselves."""
        wait_s = 1.0
        while True:
            await asyncio.sleep(0.5)
            if self._is_alive():
                wait_s = 1.0
                continue
            log.error("the broker has died (%s); starting it again", self._how())
            try:
                await self._spawn()
            except Unreachable as error:
                log.error("%s; trying again in %.0f s", error, wait_s)
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, 30.0)

    async def stop(self) -> None:
        if self._is_alive():
            self._signal(signal.SIGTERM)
            for _ in range(100):
                if not self._is_alive():
                    break
                await asyncio.sleep(0.05)
            else:
                self._signal(signal.SIGKILL)
        if self._child is not None:
            await self._child.wait()
            if self._child.stdin:
                self._child.stdin.close()

    def _signal(self, number: signal.Signals) -> None:
        """A process can be gone before we have been told."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, number)

    def _configure(self) -> bool:
        """Write the broker's files; returns whether something changed that it reads only when it starts."""
        raise NotImplementedError

    def _command(self) -> list[str]:
        raise NotImplementedError

    async def _spawn(self) -> None:
        env = {**os.environ, "IOTCORE_LOG_LEVEL": "ERROR"}
        with (self._folder / "broker.log").open("ab") as out:
            self._child = await asyncio.create_subprocess_exec(
                *self._command(), stdin=subprocess.PIPE, stdout=out, stderr=out, start_new_session=True, env=env
            )
        self._pid = self._child.pid
        deadline = asyncio.get_running_loop().time() + STARTED_WITHIN_S
        while not await self._answers():
            if not self._is_alive() or asyncio.get_running_loop().time() > deadline:
                raise Unreachable(f"the broker did not start on {self.listens} ({self._how()}): {self._last_words()}")
            await asyncio.sleep(0.02)
        log.info("broker: %s on %s, process %d", self.kind, self.listens, self._pid)

    async def _answers(self) -> bool:
        try:
            _, writer = await asyncio.open_connection(self._config.host, self._config.port)
        except OSError:
            return False
        writer.close()
        # Something may have the port already: then ours ends at once.
        await asyncio.sleep(0.05)
        return self._is_alive()

    def _is_alive(self) -> bool:
        if self._child is not None:
            return self._child.returncode is None
        return self._pid != 0 and _runs(self._pid, str(self._folder))

    def _how(self) -> str:
        code = self._child.returncode if self._child else None
        return "no longer there" if code is None else f"signal {-code}" if code < 0 else f"exit code {code}"

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            lines = (self._folder / "broker.log").read_text(errors="replace").strip().splitlines()
            return lines[-1][-300:] if lines else "it said nothing"
        return "it said nothing"


class Mosquitto(_Child):
    """Debian's mosquitto with our configuration; one that outlived a killed gateway is taken up again."""

    kind = "mosquitto"

    def __init__(self, config: BrokerConfig, folder: Path) -> None:
        super().__init__(config, folder)
        program = next((path for name in MOSQUITTO if (path := shutil.which(name))), None)
        if program is None:
            raise ConfigError(
                [
                    "broker.kind: mosquitto is not installed; `sudo apt install mosquitto` "
                    '(its own service may stay off), or set broker.kind = "embedded" to try things out'
                ]
            )
        self._program = program
        self._conf = folder / "mosquitto.conf"
        self._pid_file = folder / "mosquitto.pid"

    def address(self, user: str) -> Address:
        return Address(user, self._secrets[user], socket=self._config.socket)

    async def start(self, keys: Mapping[str, str]) -> None:
        self._keys = dict(keys)
        changed = self._configure()
        if pid := self._orphan():
            if not changed:
                self._pid = pid
                os.kill(pid, signal.SIGHUP)
                log.info("broker: mosquitto on %s was still running, process %d", self.listens, pid)
                return
            self._pid = pid
            await self.stop()
        await self._spawn()

    async def admit(self, keys: Mapping[str, str]) -> None:
        """Rewrite the password file and have mosquitto read it again; no connection is dropped."""
        self._keys = dict(keys)
        self._configure()
        self._signal(signal.SIGHUP)

    def _configure(self) -> bool:
        config, folder = self._config, self._folder
        passwords = {**self._secrets, **self._keys}
        _write(folder / "passwd", "".join(f"{user}:{_hash(key)}\n" for user, key in sorted(passwords.items())))
        _write(folder / "acl", ACL)
        user = "user root\n" if os.geteuid() == 0 else ""  # else mosquitto gives up root and can't read these files
        return _write(
            self._conf,
            f"""\
# Written by fieldpost at each start; change gateway.toml instead.
{user}pid_file {self._pid_file}
log_dest stderr
log_type error
log_type warning
# Nodes hold on to their readings, and the gateway publishes again what is retained: nothing here is worth a write.
persistence false
allow_anonymous false
password_file {folder / "passwd"}
acl_file {folder / "acl"}
message_size_limit {MAX_PAYLOAD_BYTES}
max_packet_size {MAX_PAYLOAD_BYTES + 1024}
max_inflight_messages {config.window}
max_queued_messages 1000000
# (0, no limit, makes mosquitto 2.0.11 hang up on whoever publishes where it may not; the bytes are the limit.)
max_queued_bytes {64 * 1024 * 1024}
max_keepalive 600
# What is said of a listener before the first one opens another one, on port 1883 of every interface.
listener {config.port} {config.host}
use_username_as_clientid true
listener 0 {config.socket}
use_username_as_clientid true
""",
        )

    def _command(self) -> list[str]:
        # A socket left by a killed mosquitto would keep the next one from listening.
        self._config.socket.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        self._config.socket.unlink(missing_ok=True)
        return [self._program, "-c", str(self._conf)]

    def _orphan(self) -> int:
        """The process of an earlier mosquitto of ours that still runs, or 0."""
        with contextlib.suppress(OSError, ValueError):
            pid = int(self._pid_file.read_text())
            if _runs(pid, str(self._conf)):
                return pid
        return 0


class Embedded(_Child):
    """rumqttd from the wheel `iotcore`, in a child process: for the demo, and where there is no mosquitto.

    It knows passwords but no ACL, so it is bound to loopback; a new node makes it start again.
    """

    kind = "embedded"

    def __init__(self, config: BrokerConfig, folder: Path) -> None:
        super().__init__(config, folder)
        self._conf = folder / "rumqttd.toml"
        if config.host != "127.0.0.1":
            raise ConfigError(["broker.listen: the embedded broker has no ACL, it listens on 127.0.0.1 only"])
        log.warning("broker: embedded (rumqttd); it is for trying things out, install mosquitto for real use")

    def address(self, user: str) -> Address:
        return Address(user, self._secrets[user], self._config.host, self._config.port)

    async def admit(self, keys: Mapping[str, str]) -> None:
        self._keys = dict(keys)
        self._configure()
        await self.stop()
        await self._spawn()

    def _configure(self) -> bool:
        auth = "".join(f'"{user}" = "{key}"\n' for user, key in {**self._secrets, **self._keys}.items())
        return _write(
            self._conf,
            f"""\
id = 0
[router]
max_connections = 1000
max_outgoing_packet_count = 200
max_segment_size = 10485760
max_segment_count = 10
[v4.1]
name = "nodes"
listen = "{self.listens}"
next_connection_delay_ms = 1
[v4.1.connections]
connection_timeout_ms = 60000
max_payload_size = {MAX_PAYLOAD_BYTES}
max_inflight_count = 100
[v4.1.connections.auth]
{auth}""",
        )

    def _command(self) -> list[str]:
        options = msgspec.json.encode({"config_path": str(self._conf)}).decode()
        return [sys.executable, "-c", "from iotcore._serve import main; main()", options]


def _secret(path: Path) -> str:
    """The secret in `path`, made on first use; only its owner can read it."""
    if not path.exists():
        _write(path, secrets.token_hex(32))
    return path.read_text().strip()


def _write(path: Path, text: str) -> bool:
    """Put a 0600 file in place whole; returns whether it differs from what was there."""
    with contextlib.suppress(FileNotFoundError):
        if path.read_text() == text:
            return False
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    return True


def _hash(key: str) -> str:
    """mosquitto's own form of a password: PBKDF2 with SHA-512. Keys are 256 random bits, so its 101 rounds do."""
    salt = hashlib.sha256(b"fieldpost" + key.encode()).digest()[:12]  # stable, so that an unchanged file is unchanged
    digest = hashlib.pbkdf2_hmac("sha512", key.encode(), salt, 101)
    return f"$7$101${base64.b64encode(salt).decode()}${base64.b64encode(digest).decode()}"


def _runs(pid: int, word: str) -> bool:
    """Whether `pid` is a process that has `word` in its command line."""
    try:
        return word.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
