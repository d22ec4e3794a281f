"""The nodes that may come in: name and key, made when a node is added.

One file, readable by its owner only. The key is kept (and not only what mosquitto needs of it) because the embedded
broker and TLS-PSK compare the key itself.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import msgspec

from ..errors import ConfigError
from ..wire import NODE_NAME, RESERVED


class Registry:
    """Name -> key, in `path`; every change is on the disk when the call returns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self.keys = msgspec.json.decode(path.read_bytes(), type=dict[str, str]) if path.exists() else {}
        except (OSError, msgspec.MsgspecError) as error:
            raise ConfigError(
                [f"{path}: {error}; restore it from a backup, or move it away and add the nodes again"]
            ) from None

    def add(self, name: str) -> str:
        """Let a node in and return its new key; an old one is no longer good. Raises ConfigError."""
        if not NODE_NAME.match(name) or name in RESERVED:
            raise ConfigError([f"{name!r} is no node name: 1-32 of a-z 0-9 -, and not {', '.join(sorted(RESERVED))}"])
        self.keys[name] = secrets.token_hex(32)
        self._save()
        return self.keys[name]

    def _save(self) -> None:
        temporary = self._path.with_name(self._path.name + ".new")
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.encode(self.keys))
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self._path)
