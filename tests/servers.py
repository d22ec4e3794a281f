"""Real far sides for tests and benches: a Mosquitto, a RabbitMQ, each with its own directory and ports.

Each is started, stopped, killed and held still by the test that uses it, listens on loopback only, and ends
with the process that started it. Nothing outside its directory is touched.

    with Mosquitto(tmp_path) as broker:
        broker.pause()                  # still there, says nothing
        broker.resume()
        broker.kill9()
        broker.start()                  # same port, same directory
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

if TYPE_CHECKING:
    from pika import BlockingConnection

POLL_S = 0.02
READY_S = 90
"""A RabbitMQ takes 5 to 10 s here; a loaded build machine may take several times that."""

_started: weakref.WeakSet[Server] = weakref.WeakSet()


def free_port() -> int:
    """A TCP port on loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(true: Callable[[], bool], what: str, seconds: float = READY_S) -> None:
    """Return once `true()`; raises TimeoutError naming `what` after `seconds`."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not after {seconds:g} s")
        time.sleep(POLL_S)


def answers(port: int, greeting: bytes) -> bool:
    """Whether something on `port` answers to `greeting` within a second."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as talk:
            talk.sendall(greeting)
            return bool(talk.recv(1))
    except OSError:
        return False


def listens(port: int) -> bool:
    """Whether something takes connections on `port`."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


class Certificates(NamedTuple):
    """Files of a CA made for a test, and of a server certificate for 127.0.0.1 and localhost signed by it."""

    ca: Path
    certificate: Path
    key: Path


def make_certificates(directory: Path) -> Certificates:
    """A new CA and server certificate in `directory`, by the `openssl` command."""
    directory.mkdir(parents=True, exist_ok=True)
    names = directory / "names"
    names.write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    new = "openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
    for command in (
        f"{new} -x509 -days 30 -subj /CN=fieldpost-test-ca -keyout ca.key -out ca.pem",
        f"{new} -subj /CN=127.0.0.1 -keyout server.key -out server.csr",
        "openssl x509 -req -days 30 -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out server.pem"
        " -extfile names",
    ):
        subprocess.run(command.split(), cwd=directory, check=True, capture_output=True)
    return Certificates(directory / "ca.pem", directory / "server.pem", directory / "server.key")


class Guard:
    """Kills a process group when the present process is gone, however it went; `leave` ends the watch."""

    def __init__(self, group: int) -> None:
        self._process = subprocess.Popen(
            ["sh", "-c", f"read -r nothing; kill -9 -{group}"], stdin=subprocess.PIPE, start_new_session=True
        )

    def leave(self) -> None:
        """The group has ended."""
        self._process.kill()
        self._process.wait(10)
        if self._process.stdin is not None:
            self._process.stdin.close()


class Server:
    """A server in a process group of its own; `start` returns once it serves."""

    name = "server"

    def __init__(self, directory: Path, port: int | None = None) -> None:
        self.directory = directory
        self.directory.mkdir(parents=True, exist_ok=True)
        self.port = port or free_port()
        self.log = directory / f"{self.name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: Guard | None = None
        self.start_s = 0.0

    def command(self) -> list[str]:
        """What to run."""
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        """With which environment."""
        return dict(os.environ)

    def ready(self) -> bool:
        """Whether it serves now."""
        raise NotImplementedError

    @property
    def running(self) -> bool:
        """Whether its process is there (it may be paused)."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of the process that was started."""
        assert self._process is not None, f"{self.name} was not started"
        return self._process.pid

    def start(self) -> Self:
        """Start and wait until it serves. Raises RuntimeError, with the end of its log, when it ends instead."""
        began = time.monotonic()
        _started.add(self)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command(),
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                start_new_session=True,
            )
        self._guard = Guard(self.pid)
        try:
            wait_until(lambda: not self.running or self.ready(), f"{self.name} on port {self.port} serves")
            if not self.running:
                raise RuntimeError(f"{self.name} ended at its start:\n{self.tail()}")
        except BaseException:
            self.kill9()
            raise
        self.start_s = time.monotonic() - began
        return self

    def stop(self) -> None:
        """End it as its operator would (SIGTERM); by force after a while."""
        if self.running:
            self.resume()
            os.kill(self.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process and self._process.wait(30)
        self.kill9()

    def kill9(self) -> None:
        """End it, and all that it started, between two instructions."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait(10)
            self._process = None
        if self._guard is not None:
            self._guard.leave()
            self._guard = None

    def restart(self) -> None:
        """Stop and start: same port, same directory."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Hold it still: connections stay open, nothing is answered."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Go on after `pause`."""
        self._signal(signal.SIGCONT)

    def tail(self, lines: int = 30) -> str:
        """The end of its log."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def __enter__(self) -> Self:
        return self if self.running else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


@atexit.register
def _end_all() -> None:
    for server in list(_started):
        server.kill9()


class Mosquitto(Server):
    """A Mosquitto: anonymous unless `users` (name to password) are given, encrypted when `tls` is.

    `extra` is added to its configuration.
    """

    name = "mosquitto"

    def __init__(
        self,
        directory: Path,
        port: int | None = None,
        *,
        users: dict[str, str] | None = None,
        tls: Certificates | None = None,
        extra: str = "",
    ) -> None:
        super().__init__(directory, port)
        self.users = users or {}
        self.extra = extra
        self.tls = tls

    def command(self) -> list[str]:
        program = shutil.which("mosquitto", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
        assert program, "mosquitto is not installed"
        # Started by root it would become the user `mosquitto`, who may not read our directory.
        lines = [f"listener {self.port} 127.0.0.1", "user root" if os.geteuid() == 0 else ""]
        if self.users:
            lines += ["allow_anonymous false", f"password_file {self._write_passwords()}"]
        else:
            lines += ["allow_anonymous true"]
        if self.tls:
            lines += [f"certfile {self.tls.certificate}", f"keyfile {self.tls.key}"]
        conf = self.directory / "mosquitto.conf"
        conf.write_text("\n".join([*lines, self.extra, ""]))
        return [program, "-c", str(conf)]

    def ready(self) -> bool:
        if self.tls:
            return listens(self.port)
        # A CONNECT without a client id; any CONNACK will do, also a refusal.
        return answers(self.port, b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x05\x00\x00")

    def url(self, user: str = "", password: str = "") -> str:
        """Its address, `mqtt://127.0.0.1:PORT`."""
        login = f"{user}:{password}@" if password else f"{user}@" if user else ""
        return f"mqtt{'s' if self.tls else ''}://{login}127.0.0.1:{self.port}"

    def _write_passwords(self) -> Path:
        file = self.directory / "passwords"
        file.write_text("".join(f"{name}:{password}\n" for name, password in self.users.items()))
        file.chmod(0o600)
        subprocess.run(["mosquitto_passwd", "-U", str(file)], check=True, capture_output=True)
        return file


class Received(NamedTuple):
    """A message as it lay in a queue."""

    id: str
    body: bytes
    encoding: str
    content_type: str
    delivery_mode: int
    redelivered: bool


class RabbitMQ(Server):
    """A RabbitMQ node of its own, with its own epmd, cookie and data; run by whoever runs the tests.

    Debian's `/usr/sbin/rabbitmq-server` insists on its own user, so the scripts below `lib` are run. `extra` is
    added to `rabbitmq.conf`. Messages over `max_message_bytes` are refused.
    """

    name = "rabbitmq"
    user = "fieldpost"
    password = "only-for-tests"
    max_message_bytes = 1_000_000

    def __init__(self, directory: Path, port: int | None = None, *, extra: str = "") -> None:
        super().__init__(directory, port)
        self.extra = extra
        self.node = f"fieldpost-{uuid.uuid4().hex[:8]}@localhost"
        self.scripts = next(
            (path for path in map(Path, _SCRIPTS) if (path / "rabbitmq-server").exists()), Path("not-installed")
        )
        self._epmd_port = free_port()
        self._epmd: subprocess.Popen[bytes] | None = None
        self._epmd_guard: Guard | None = None
        self._dist_port = free_port()
        self.tls_port = free_port()
        self.tls: Certificates | None = None

    def url(self, user: str | None = None, *, password: str | None = None, query: str = "") -> str:
        """Its address with login, for a client; without a password when it is an empty text."""
        password = self.password if password is None else password
        login = (user or self.user) + (f":{password}" if password else "")
        return f"amqp://{login}@127.0.0.1:{self.port}/%2F{query}"

    def start(self) -> Self:
        if self._epmd is None:
            self._prepare()
            self._epmd = subprocess.Popen(
                ["epmd", "-address", "127.0.0.1", "-port", str(self._epmd_port)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            self._epmd_guard = Guard(self._epmd.pid)
            wait_until(lambda: answers(self._epmd_port, b"\x00\x01n"), "epmd answers", 10)
        return super().start()

    def stop(self) -> None:
        super().stop()
        self._end_epmd()

    def restart(self) -> None:
        super().stop()
        self.start()

    def command(self) -> list[str]:
        return [str(self.scripts / "rabbitmq-server")]

    def environment(self) -> dict[str, str]:
        at = self.directory
        own = {
            "HOME": at,
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_NODE_PORT": self.port,
            "RABBITMQ_DIST_PORT": self._dist_port,
            "RABBITMQ_BASE": at,
            "RABBITMQ_MNESIA_BASE": at / "data",
            "RABBITMQ_LOG_BASE": at / "log",
            "RABBITMQ_CONFIG_FILE": at / "rabbitmq.conf",
            "RABBITMQ_ADVANCED_CONFIG_FILE": at / "advanced.config",
            "RABBITMQ_CONF_ENV_FILE": at / "rabbitmq-env.conf",
            "RABBITMQ_ENABLED_PLUGINS_FILE": at / "plugins",
            "RABBITMQ_GENERATED_CONFIG_DIR": at / "generated",
            "RABBITMQ_SCHEMA_DIR": at / "schema",
            "RABBITMQ_PID_FILE": at / "pid",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none",
            "RABBITMQ_CTL_ERL_ARGS": "+S 1:1 +sbwt none",
            # Makes the script become the runtime instead of its parent, so that our signals reach it. Not a socket.
            "NOTIFY_SOCKET": at / "not-systemd",
            "ERL_EPMD_PORT": self._epmd_port,
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "LANG": "C.UTF-8",
        }
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("RABBITMQ_")}
        return inherited | {key: str(value) for key, value in own.items()}

    def ready(self) -> bool:
        return answers(self.port, b"AMQP\x00\x00\x09\x01")

    def ctl(self, *words: str) -> str:
        """What `rabbitmqctl WORDS` prints; takes seconds. Raises RuntimeError with what it says when it fails."""
        done = subprocess.run(
            [str(self.scripts / "rabbitmqctl"), "--quiet", "--node", self.node, *words],
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            raise RuntimeError(f"rabbitmqctl {' '.join(words)}: {done.stdout}{done.stderr}")
        return done.stdout

    def add_user(self, name: str, password: str, *, configure: str = "", write: str = "", read: str = "") -> None:
        """A user who may do what the three regular expressions allow in `/`."""
        self.ctl("add_user", name, password)
        self.ctl("set_permissions", "-p", "/", name, configure or "^$", write or "^$", read or "^$")

    def settle(self) -> None:
        """Have the names of new quorum queues written, as happens by itself within about 6 s.

        A queue that is younger at a `kill9` comes back empty and, for a minute or more, without a leader
        (measured, 3.10.8: its files are there, the entry in `names.dets` is not).
        """
        self.ctl("eval", "lists:foreach(fun dets:sync/1, dets:all()).")

    @contextmanager
    def alarmed(self) -> Iterator[None]:
        """A memory alarm inside the block: every connection that publishes is told `blocked`."""
        self.ctl("set_vm_memory_high_watermark", "0.00000001")
        try:
            yield
        finally:
            self.ctl("set_vm_memory_high_watermark", "0.4")

    @contextmanager
    def connected(self) -> Iterator[BlockingConnection]:
        """A plain connection of the operator, for queues and the like; blocks."""
        import pika

        connection = pika.BlockingConnection(pika.URLParameters(self.url()))
        try:
            yield connection
        finally:
            if connection.is_open:
                connection.close()

    def drain(self, queue: str) -> list[Received]:
        """Take all that now lies in `queue`, in order; blocks."""
        taken = []
        with self.connected() as connection:
            channel = connection.channel()
            while (found := channel.basic_get(queue, auto_ack=True))[0] is not None:
                method, properties, body = found
                taken.append(
                    Received(
                        id=properties.message_id or "",
                        body=body or b"",
                        encoding=properties.content_encoding or "",
                        content_type=properties.content_type or "",
                        delivery_mode=properties.delivery_mode or 0,
                        redelivered=method.redelivered,
                    )
                )
        return taken

    def delete(self, queue: str) -> None:
        """Remove a queue and what is in it; nothing happens when there is none."""
        with self.connected() as connection:
            connection.channel().queue_delete(queue)

    def declare(self, queue: str, arguments: dict[str, object] | None = None, *, durable: bool = True) -> None:
        """Make a queue with `arguments`."""
        with self.connected() as connection:
            connection.channel().queue_declare(queue, durable=durable, arguments=arguments)

    def _prepare(self) -> None:
        at = self.directory
        cookie = at / ".erlang.cookie"
        if not cookie.exists():
            cookie.write_text(uuid.uuid4().hex)
            cookie.chmod(0o400)
        self.tls = make_certificates(at / "tls")
        (at / "plugins").write_text("[].\n")
        (at / "rabbitmq-env.conf").write_text("")
        for folder in ("data", "log", "generated", "schema"):
            (at / folder).mkdir(exist_ok=True)
        (at / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self.port}\n"
            f"listeners.ssl.1 = 127.0.0.1:{self.tls_port}\n"
            f"ssl_options.cacertfile = {self.tls.ca}\n"
            f"ssl_options.certfile = {self.tls.certificate}\n"
            f"ssl_options.keyfile = {self.tls.key}\n"
            "ssl_options.verify = verify_none\n"
            "loopback_users = none\n"
            f"default_user = {self.user}\n"
            f"default_pass = {self.password}\n"
            f"max_message_size = {self.max_message_bytes}\n"
            "vm_memory_high_watermark.relative = 0.4\n"
            "disk_free_limit.absolute = 50MB\n"
            "raft.wal_max_size_bytes = 16777216\n"
            f"{self.extra}\n"
        )

    def _end_epmd(self) -> None:
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait(10)
            self._epmd = None
        if self._epmd_guard is not None:
            self._epmd_guard.leave()
            self._epmd_guard = None


_SCRIPTS = ("/usr/lib/rabbitmq/bin", "/usr/local/lib/rabbitmq/bin", "/opt/rabbitmq/sbin")


@functools.cache
def shared_rabbitmq() -> RabbitMQ:
    """The one RabbitMQ of this test run, started at the first call and ended with the process."""
    directory = Path(tempfile.mkdtemp(prefix="fieldpost-rabbitmq-"))
    server = RabbitMQ(directory)

    @atexit.register
    def end() -> None:
        server.kill9()
        server._end_epmd()
        shutil.rmtree(directory, ignore_errors=True)

    return server.start()
