"""Where a far side is: what its URL says, without guessing.

    Address.parse("amqps://plant@broker.example/%2F?cacertfile=/etc/plant-ca.pem")

The names of the TLS options are those of RabbitMQ's URI specification, for MQTT as well: `cacertfile`,
`certfile` with `keyfile`, and `verify=verify_none`, which accepts any server.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field, replace
from urllib.parse import parse_qsl, unquote, urlsplit

from ..errors import ConfigError

_PORTS = {"amqp": 5672, "amqps": 5671, "mqtt": 1883, "mqtts": 8883}
_TLS_OPTIONS = frozenset({"cacertfile", "certfile", "keyfile", "verify"})


@dataclass(frozen=True, slots=True)
class Address:
    """A server and what is to be known to reach it; `path` is unquoted and has no leading slash.

    `path` is None where the URL has none (`mqtt://host`), and empty for `mqtt://host/`.
    """

    scheme: str
    host: str
    port: int
    user: str = ""
    password: str = field(default="", repr=False)
    path: str | None = None
    options: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, url: str, *schemes: str) -> Address:
        """Read `url`, whose scheme must be one of `schemes`. Raises ConfigError, which has no password in it."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as fault:
            raise ConfigError([f"url: {fault}"]) from None
        wanted = schemes or tuple(_PORTS)
        if parts.scheme not in wanted:
            likely = " or ".join(f"{scheme}://host" for scheme in wanted)
            raise ConfigError([f"url: starts with {parts.scheme or 'no scheme'!r}; write {likely}"])
        if not parts.hostname:
            raise ConfigError([f"url: names no host; write {parts.scheme}://host"])
        return cls(
            scheme=parts.scheme,
            host=parts.hostname,
            port=port or _PORTS[parts.scheme],
            user=unquote(parts.username or ""),
            password=unquote(parts.password or ""),
            path=unquote(parts.path[1:]) if parts.path else None,
            options=tuple(parse_qsl(parts.query)),
        )

    def login(self, user: str, password: str) -> Address:
        """The same place with another login; what is empty stays as the URL has it."""
        return replace(self, user=user or self.user, password=password or self.password)

    def option(self, name: str, default: str = "") -> str:
        """The value behind `?name=`."""
        return dict(self.options).get(name, default)

    def check_options(self, *names: str) -> None:
        """Raises ConfigError when the URL has an option that is neither in `names` nor about TLS."""
        known = _TLS_OPTIONS.union(names)
        faults = [
            f"url: no option {name!r}; there are {', '.join(sorted(known))}"
            for name, _ in self.options
            if name not in known
        ]
        if faults:
            raise ConfigError(faults)

    @property
    def encrypted(self) -> bool:
        """Whether the way there is TLS."""
        return self.scheme.endswith("s")

    def tls(self) -> ssl.SSLContext | None:
        """The context for an encrypted way, None for a plain one. Reads files; raises ConfigError."""
        if not self.encrypted:
            return None
        try:
            context = ssl.create_default_context(cafile=self.option("cacertfile") or None)
            if self.option("certfile"):
                context.load_cert_chain(self.option("certfile"), self.option("keyfile") or None)
        except (OSError, ssl.SSLError) as fault:
            raise ConfigError([f"url: cacertfile, certfile or keyfile can't be used: {fault}"]) from None
        if self.option("verify") == "verify_none":
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    def __str__(self) -> str:
        """For people: `amqp://host:port`, without login."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"
