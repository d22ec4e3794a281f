"""The gateway's configuration: one TOML file, read once into frozen dataclasses.

All faults are told together, each by its path and with what is allowed. A default stands here and nowhere else;
deploy/gateway.toml explains every setting and is read by a test.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload
from urllib.parse import unquote, urlsplit

from .errors import ConfigError
from .urgency import UrgentRule

_SIZE = re.compile(r"(\d+)\s*(B|kB|MB|GB|KiB|MiB|GiB)?\Z")
_UNITS = {None: 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h|d|w)?\Z")
_SECONDS = {None: 1, "s": 1, "min": 60, "h": 3600, "d": 86400, "w": 604_800}
_WORD = r"[a-z0-9-]{1,32}"


@dataclass(frozen=True, slots=True)
class BrokerConfig:
    """The nodes' broker. `window`: messages that it hands over before the first is acknowledged."""

    kind: str
    host: str
    port: int
    socket: Path
    window: int
    username: str = ""
    password: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class SpoolConfig:
    """The durable queue on the card."""

    linger_s: float
    stage_readings: int
    max_bytes: int
    min_free_bytes: int
    keep_s: float
    write: str
    ack_when: str
    full: str
    max_age_s: float
    urgent_max_bytes: int
    urgent_max_age_s: float
    trust_card: bool


@dataclass(frozen=True, slots=True)
class UplinkConfig:
    """One far side; which of the fields count depends on `kind`."""

    name: str
    kind: str
    url: str
    username: str
    password: str = field(repr=False)
    topic: str = ""
    version: str = "5"
    exchange: str = ""
    routing_key: str = "fieldpost"
    queue: str = "fieldpost"
    queue_type: str = "quorum"
    declare: bool = True
    timeout_s: float = 15.0
    durable: str = "auto"
    heartbeat_s: int = 20


@dataclass(frozen=True, slots=True)
class RouteConfig:
    """Which uplink gets the readings, in batches of what size. `id` is where its progress is kept; never change it.

    `form`: what a message looks like. `gather_s`: how long a fresh reading may wait for others; 0: an idle uplink gets
    each at once. `ttl_s`: older readings are not sent any more; 0: never. The paces hold for history after an outage;
    0: none.
    """

    id: str
    uplink: str
    batch_readings: int
    window: int
    form: str = "senml"
    gather_s: float = 0.0
    ttl_s: float = 0.0
    backfill_readings_per_s: float = 0.0
    backfill_bytes_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that is configured."""

    name: str
    data: Path
    control: Path
    broker: BrokerConfig
    spool: SpoolConfig
    uplinks: tuple[UplinkConfig, ...]
    routes: tuple[RouteConfig, ...]
    urgent: tuple[UrgentRule, ...] = ()


@dataclass(frozen=True, slots=True)
class Folders:
    """Where things are when nothing else is said: the system's places for root, the XDG folders for anybody else."""

    config: Path
    data: Path
    run: Path


def parse_duration(text: str) -> float | None:
    """Seconds of "90s", "15min", "6h", "7d" or a plain number; None where it is none of these."""
    match = _DURATION.match(text)
    return float(match[1]) * _SECONDS[match[2]] if match else None


def folders() -> Folders:
    if os.geteuid() == 0:
        return Folders(Path("/etc/fieldpost"), Path("/var/lib/fieldpost"), Path("/run/fieldpost"))
    home = Path.home()
    data = Path(os.environ.get("XDG_DATA_HOME") or home / ".local/share") / "fieldpost"
    return Folders(
        config=Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "fieldpost",
        data=data,
        run=Path(os.environ["XDG_RUNTIME_DIR"]) / "fieldpost" if "XDG_RUNTIME_DIR" in os.environ else data / "run",
    )


def load(path: Path) -> Config:
    """Read and check a configuration file. Raises ConfigError with every fault that it has."""
    try:
        raw = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError([f"{path}: there is no such file; name one with --config"]) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError([f"{path}: {error}"]) from None
    return parse(raw, path.parent)


def parse(raw: dict[str, Any], base: Path) -> Config:
    """A configuration from its tables; relative paths count from `base`. Raises ConfigError."""
    faults: list[str] = []
    places = folders()
    top = _Table(raw, "", faults, base)
    gateway = top.table("gateway")
    name = gateway.word("name", "gateway")
    data = gateway.path("data", places.data)
    control = gateway.path("control", places.run / "control.sock")
    gateway.done()
    broker = _broker(top.table("broker"), control)
    spool = _spool(top.table("spool"))
    uplinks = [_uplink(table, name) for table in top.tables("uplinks")]
    routes = [_route(table, [uplink.name for uplink in uplinks]) for table in top.tables("routes")]
    urgent = [_urgent(table) for table in top.tables("urgent")]
    top.done()
    _unique(faults, "uplinks", "name", [uplink.name for uplink in uplinks])
    _unique(faults, "routes", "id", [route.id for route in routes])
    if len(str(broker.socket)) > 100:
        faults.append(f"gateway.control: the path is {len(str(control))} bytes; a unix socket's must be below 100")
    if faults:
        raise ConfigError(faults)
    return Config(name, data, control, broker, spool, tuple(uplinks), tuple(routes), tuple(urgent))


def _broker(table: _Table, control: Path) -> BrokerConfig:
    kind = table.choice("kind", "mosquitto", ["mosquitto", "embedded", "external"])
    listen = table.text("url" if kind == "external" else "listen", "127.0.0.1:1883")
    host, port = _host_port(table, listen, "url" if kind == "external" else "listen")
    config = BrokerConfig(
        kind=kind,
        host=host,
        port=port,
        socket=control.with_name("broker.sock"),
        window=int(table.number("window", 1000, 20, 20_000)),
        username=table.text("username", "") if kind == "external" else "",
        password=table.secret("password_file") if kind == "external" else "",
    )
    table.done()
    return config


def _spool(table: _Table) -> SpoolConfig:
    config = SpoolConfig(
        # Gathers what all nodes send into one write; they wait for it with the readings in hand.
        linger_s=table.number("linger_s", 5.0, 0.0, 60.0),
        stage_readings=int(table.number("stage_readings", 20_000, 100, 1_000_000)),
        max_bytes=table.size("max_bytes", 2_000_000_000),
        min_free_bytes=table.size("min_free_disk", 200_000_000),
        keep_s=table.duration("keep", "7d"),
        write=table.choice("write", "when-needed", ["when-needed", "always"]),
        ack_when=table.choice("ack_when", "durable", ["durable", "any-uplink", "all-uplinks"]),
        full=table.choice("full", "thin", ["thin", "drop-oldest", "hold"]),
        max_age_s=table.duration("max_age", "0"),
        urgent_max_bytes=table.size("urgent_max_bytes", 0),
        urgent_max_age_s=table.duration("urgent_max_age", "0"),
        trust_card=table.flag("trust_card", False),
    )
    table.done()
    return config


_PORTS = {"amqp": 5672, "amqps": 5671, "mqtt": 1883, "mqtts": 8883}


def _uplink(table: _Table, gateway: str) -> UplinkConfig:
    kind = table.choice("kind", None, ["mqtt", "amqp"])
    url = table.text("url", None)
    username = ""
    parts = urlsplit(url)
    schemes = ["mqtt", "mqtts"] if kind == "mqtt" else ["amqp", "amqps"]
    if url:
        try:
            port = parts.port or _PORTS.get(parts.scheme, 0)
        except ValueError:
            port = 0
        if parts.scheme not in schemes or not parts.hostname or not port:
            table.fault("url", f"{_without_password(url)!r} is not like {schemes[0]}://host:port")
        if parts.password is not None:
            table.fault("url", "a password does not belong here; put it into a file and name it as password_file")
        username = unquote(parts.username or "")
    config = UplinkConfig(
        name=table.word("name", None),
        kind=kind,
        url=url,
        username=table.text("username", username),
        password=table.secret("password_file"),
        topic=table.text("topic", f"fieldpost/{gateway}") if kind == "mqtt" else "",
        version=table.choice("version", "5", ["5", "3.1.1"]) if kind == "mqtt" else "",
        exchange=table.text("exchange", "") if kind == "amqp" else "",
        routing_key=table.text("routing_key", "fieldpost") if kind == "amqp" else "",
        queue=table.text("queue", "fieldpost") if kind == "amqp" else "",
        queue_type=table.choice("queue_type", "quorum", ["quorum", "classic"]) if kind == "amqp" else "",
        declare=table.flag("declare", True) if kind == "amqp" else True,
        timeout_s=table.number("timeout_s", 15.0, 0.5, 300.0),
        durable=_durable(table) if kind == "amqp" else "no",
        heartbeat_s=int(table.number("heartbeat_s", 20 if kind == "amqp" else 30, 5, 3600)),
    )
    table.done()
    return config


def _durable(table: _Table) -> str:
    """Left out: the broker is asked."""
    return {None: "auto", True: "yes", False: "no"}[table.flag("durable", None)]


def _urgent(table: _Table) -> UrgentRule:
    rule = UrgentRule(
        node=table.text("node", "*"),
        channel=table.text("channel", None),
        above=table.maybe_number("above"),
        below=table.maybe_number("below"),
        failed=bool(table.flag("failed", False)),
    )
    if rule.above is None and rule.below is None and not rule.failed:
        table.fault("", "says not when: set above, below or failed = true")
    table.done()
    return rule


def _route(table: _Table, uplinks: list[str]) -> RouteConfig:
    config = RouteConfig(
        id=table.word("id", None),
        uplink=table.text("uplink", None),
        batch_readings=int(table.number("batch_readings", 500, 1, 10_000)),
        window=int(table.number("window", 8, 1, 100)),
        form=table.choice("form", "senml", ["senml", "columns"]),
        gather_s=table.duration("gather", "0"),
        ttl_s=table.duration("ttl", "0"),
        backfill_readings_per_s=table.number("backfill_readings_per_s", 0.0, 0.0, 1e9),
        backfill_bytes_per_s=table.number("backfill_bytes_per_s", 0.0, 0.0, 1e9),
    )
    if config.uplink and config.uplink not in uplinks:
        there = ", ".join(f'"{name}"' for name in uplinks) or "none yet: add a table [[uplinks]]"
        table.fault("uplink", f'no uplink "{config.uplink}"; there are: {there}')
    table.done()
    return config


def _host_port(table: _Table, text: str, key: str) -> tuple[str, int]:
    host, _, port = text.removeprefix("mqtt://").rpartition(":")
    if not host or not port.isdigit() or not 1 <= int(port) <= 65535:
        table.fault(key, f"{text!r} is not like 127.0.0.1:1883")
        return "127.0.0.1", 1883
    return host.strip("[]"), int(port)


def _unique(faults: list[str], tables: str, key: str, values: list[str]) -> None:
    for index, value in enumerate(values):
        if value and value in values[:index]:
            faults.append(f'{tables}[{index}].{key}: "{value}" is there twice')


def _without_password(url: str) -> str:
    return re.sub(r":[^:/@]*@", ":...@", url)


class _Table:
    """One table of the file: takes out settings by type, notes every fault under its path."""

    def __init__(self, raw: Any, path: str, faults: list[str], base: Path) -> None:
        self._path = path
        self._faults = faults
        self._base = base
        self._known: list[str] = []
        if not isinstance(raw, dict):
            self.fault("", f"must be a table, not {raw!r}")
            raw = {}
        self._raw: dict[str, Any] = raw

    def fault(self, key: str, what: str) -> None:
        self._faults.append(f"{'.'.join(filter(None, (self._path, key)))}: {what}")

    def table(self, key: str) -> _Table:
        return _Table(self._take(key, {}), self._under(key), self._faults, self._base)

    def tables(self, key: str) -> list[_Table]:
        raw = self._take(key, [])
        if not isinstance(raw, list):
            self.fault(key, f"must be [[{key}]], one for each")
            raw = []
        return [_Table(one, f"{self._under(key)}[{i}]", self._faults, self._base) for i, one in enumerate(raw)]

    def text(self, key: str, default: str | None) -> str:
        value = self._take(key, default)
        if value is None:
            self.fault(key, "is missing")
            return ""
        if not isinstance(value, str):
            self.fault(key, f"must be a text, not {value!r}")
            return ""
        return value

    def word(self, key: str, default: str | None) -> str:
        value = self.text(key, default)
        if value and not re.fullmatch(_WORD, value):
            self.fault(key, f"{value!r} must be 1-32 of a-z 0-9 -")
        return value

    def choice(self, key: str, default: str | None, allowed: Iterable[str]) -> str:
        value = self.text(key, default)
        if value and value not in allowed:
            self.fault(key, f"{value!r} is not one of {', '.join(f'{one!r}' for one in allowed)}")
        return value

    def number(self, key: str, default: float, low: float, high: float) -> float:
        value = self._take(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            self.fault(key, f"must be a number from {low:g} to {high:g}, not {value!r}")
            return default
        return value

    def maybe_number(self, key: str) -> float | None:
        value = self._take(key, None)
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            return value
        self.fault(key, f"must be a number, not {value!r}")
        return None

    @overload
    def flag(self, key: str, default: bool) -> bool: ...

    @overload
    def flag(self, key: str, default: None) -> bool | None: ...

    def flag(self, key: str, default: bool | None) -> bool | None:
        value = self._take(key, default)
        if value is not default and not isinstance(value, bool):
            self.fault(key, f"must be true or false, not {value!r}")
            return default
        return value

    def duration(self, key: str, default: str) -> float:
        """Seconds; written as a number of them, or with a unit: "90s", "15min", "6h", "7d"."""
        value = self._take(key, default)
        seconds = None if isinstance(value, bool) else parse_duration(str(value))
        if seconds is None:
            self.fault(key, f'must be a time such as "90s", "15min", "6h" or "7d", not {value!r}')
            return parse_duration(default) or 0.0
        return seconds

    def size(self, key: str, default: int) -> int:
        value = self._take(key, default)
        match = _SIZE.match(str(value))
        if isinstance(value, bool) or match is None:
            self.fault(key, f'must be a size such as "500MB" or "2GiB", not {value!r}')
            return default
        return int(match[1]) * _UNITS[match[2]]

    def path(self, key: str, default: Path) -> Path:
        text = self.text(key, str(default))
        return self._base / Path(text).expanduser()

    def secret(self, key: str) -> str:
        """The content of a file that only its owner can read; empty where none is named."""
        text = self.text(key, "")
        if not text:
            return ""
        path = self._base / Path(text).expanduser()
        try:
            if path.stat().st_mode & 0o077:
                self.fault(key, f"{path} can be read by others; `chmod 600 {path}`")
            return path.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            self.fault(key, str(error))
            return ""

    def done(self) -> None:
        """Whatever has not been asked for is not a setting."""
        for key in self._raw:
            if key not in self._known:
                near = difflib.get_close_matches(key, self._known, 1)
                hint = f'did you mean "{near[0]}"?' if near else f"there are: {', '.join(sorted(self._known))}"
                self.fault(key, f"no such setting here; {hint}")

    def _under(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key

    def _take(self, key: str, default: Any) -> Any:
        self._known.append(key)
        return self._raw.get(key, default)
