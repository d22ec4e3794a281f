"""The gateway: opens the parts in the order of the way, back to front, and closes them in reverse.

What comes later in a reading's way is opened first and closed last, so nothing is taken that can't be kept.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from . import __version__, uplinks
from .broker import Broker, open_broker
from .config import Config
from .control import Verb, open_control
from .forward import Route
from .ingest import Ingest, boottime_ms
from .nodes.presence import Presence
from .nodes.registry import Registry
from .nodes.time import Dating
from .session import Session
from .spool import Spool, SpoolSettings

log = logging.getLogger(__name__)


async def run(config: Config) -> None:
    """Carry readings from the nodes to the uplinks until cancelled.

    Raises ConfigError, SpoolFault or Unreachable where it can't start; the message says what to do.
    """
    async with Spool(_spool_settings(config), [route.id for route in config.routes]) as spool:
        routes = [Route(route, spool, _uplink(config, route.uplink), spool.manifests) for route in config.routes]
        registry = Registry(config.data / "nodes.json")
        async with open_broker(config.broker, config.data / "broker", registry.keys) as broker:
            presence, dating = Presence(), Dating()
            ingest = Ingest(spool, presence, dating)
            ingest.remember()
            session = Session(broker, spool, ingest, presence, dating)
            view = View(config, spool, routes, broker, registry, ingest, session, presence)
            async with open_control(config.control, view.verbs()):
                log.info(
                    "gateway %s %s: generation %s, boot %d", config.name, __version__, spool.generation, spool.boot
                )
                async with asyncio.TaskGroup() as parts:
                    for route in routes:
                        parts.create_task(route.run(), name=f"forward {route.config.id}")
                    parts.create_task(session.run(), name="session")


def _spool_settings(config: Config) -> SpoolSettings:
    spool = config.spool
    return SpoolSettings(
        folder=Path(config.data),
        linger_s=spool.linger_s,
        stage_readings=spool.stage_readings,
        max_bytes=spool.max_bytes,
        min_free_bytes=spool.min_free_bytes,
    )


def _uplink(config: Config, name: str) -> uplinks.Uplink:
    uplink = next(uplink for uplink in config.uplinks if uplink.name == name)
    return uplinks.make(uplink, client_id=f"fieldpost-{config.name}-{uplink.name}")


class View:
    """What the command line sees of the gateway, and the few things that it may ask of it."""

    def __init__(
        self,
        config: Config,
        spool: Spool,
        routes: list[Route],
        broker: Broker,
        registry: Registry,
        ingest: Ingest,
        session: Session,
        presence: Presence,
    ) -> None:
        self._config = config
        self._spool = spool
        self._routes = routes
        self._broker = broker
        self._registry = registry
        self._ingest = ingest
        self._session = session
        self._presence = presence
        self._started = time.monotonic()

    def verbs(self) -> dict[str, Verb]:
        """What can be asked, by name."""
        return {"status": self.status, "add": self.add, "ledger": self.ledger}

    async def add(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Let a node in: its key, shown this once, and where it connects to."""
        key = self._registry.add(str(request.get("node", "")))
        await self._broker.admit(self._registry.keys)
        host, _, port = self._broker.listens.rpartition(":")
        return {"node": request["node"], "key": key, "host": host, "port": int(port)}

    async def ledger(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What was given up, newest first."""
        limit = request.get("limit", 100)
        entries = await self._spool.ledger(limit if isinstance(limit, int) and 0 < limit <= 10_000 else 100)
        return [
            {
                "at_ms": at_ms,
                "node": event.node,
                "install": event.install,
                "boot": event.boot,
                "first": event.first,
                "last": event.last,
                "why": event.why,
            }
            for at_ms, event in entries
        ]

    async def status(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that `fieldpost status` shows."""
        now, unix_ms = boottime_ms(), time.time_ns() // 1_000_000
        spool = await self._spool.status()
        routes = []
        for route in self._routes:
            status = msgspec.to_builtins(route.status())
            backlog = spool.backlog[route.config.id]
            oldest_ms = spool.oldest_ms[route.config.id]
            # An age only where there is a backlog; the rate is what drains, so it tells only while it drains.
            status["backlog"] = backlog
            status["lag_s"] = max(0.0, (unix_ms - oldest_ms) / 1000) if backlog and oldest_ms else 0.0
            status["drain_min"] = backlog / status["rate"] / 60 if backlog and status["rate"] else None
            routes.append(status)
        return {
            "gateway": self._config.name,
            "version": __version__,
            "up_s": time.monotonic() - self._started,
            "state": self._session.state,
            "broker": {"kind": self._broker.kind, "listens": self._broker.listens},
            "spool": msgspec.to_builtins(spool),
            "routes": routes,
            "intake": {
                "messages": self._ingest.messages,
                "rows": self._ingest.rows,
                "refused_full": self._ingest.refused,
                "refused_ahead": self._ingest.ahead,
                "rejected": self._ingest.rejected,
                "stale_wills": self._presence.stale_wills,
            },
            "nodes": [
                {
                    "node": name,
                    "state": node.st,
                    "install": node.install,
                    "boot": node.boot,
                    "firmware": node.firmware,
                    "last_seen_s": (now - node.last_seen_ms) / 1000 if node.last_seen_ms >= 0 else None,
                    "readings": node.readings,
                    "missing": node.missing,
                    "queued": node.queued,
                    "conflict": self._presence.conflict(name, now),
                }
                for name, node in sorted(self._presence.nodes.items())
            ],
        }
