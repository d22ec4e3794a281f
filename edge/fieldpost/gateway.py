"""The gateway: opens the parts in the order of the way, back to front, and closes them in reverse.

What comes later in a reading's way is opened first and closed last, so nothing is taken that can't be kept.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from . import __version__, uplinks
from .broker import Broker, open_broker
from .config import Config, RouteConfig
from .control import Verb, open_control
from .errors import ConfigError, Rejected, Unreachable
from .forward import Route
from .ingest import Ingest, boottime_ms
from .nodes.presence import Presence
from .nodes.registry import Registry
from .nodes.time import Dating
from .reading import Manifest, Quality, Reading
from .session import Session
from .spool import LaneName, Limits, RouteTerms, Spool, SpoolSettings, SpoolStatus, Terms
from .spool.rows import Refused
from .urgency import Urgency

log = logging.getLogger(__name__)

PAGE_READINGS = 2000
CARD_CYCLES, CARD_AMPLIFICATION = 500, 4
"""An estimate for a plain consumer card: erase cycles that a cell bears, and what the card writes for a byte of ours
in small pieces. An industrial card bears ten times as much."""


async def run(config: Config) -> None:
    """Carry readings from the nodes to the uplinks until cancelled.

    Raises ConfigError, SpoolFault or Unreachable where it can't start; the message says what to do.
    """
    async with Spool(spool_settings(config), route_terms(config)) as spool:
        routes = [Route(route, spool, _uplink(config, route), spool.manifests) for route in config.routes]
        registry = Registry(config.data / "nodes.json")
        async with open_broker(config.broker, config.data / "broker", registry.keys) as broker:
            presence, dating = Presence(), Dating()
            ingest = Ingest(spool, presence, dating, Urgency(config.urgent))
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


def spool_settings(config: Config) -> SpoolSettings:
    """What the configuration says of the spool, in its own words."""
    spool = config.spool
    bulk = Limits(max_age_ms=round(spool.max_age_s * 1000))
    urgent = Limits(spool.urgent_max_bytes, round(spool.urgent_max_age_s * 1000))
    return SpoolSettings(
        folder=Path(config.data),
        terms=Terms(
            linger_ms=round(spool.linger_s * 1000),
            event_linger_ms=min(round(spool.linger_s * 1000), 1000),
            stage_readings=spool.stage_readings,
            keep_ms=round(spool.keep_s * 1000),
            write=spool.write,
            ack_when=spool.ack_when,
            full=spool.full,
            limits={LaneName.BULK: bulk, LaneName.URGENT: urgent},
        ),
        max_bytes=spool.max_bytes,
        min_free_bytes=spool.min_free_bytes,
        trust_card=spool.trust_card,
    )


def route_terms(config: Config) -> list[RouteTerms]:
    """What the spool is to know of the routes."""
    return [
        RouteTerms(route.id, route.batch_readings, round(route.ttl_s * 1000), round(route.gather_s * 1000))
        for route in config.routes
    ]


def _uplink(config: Config, route: RouteConfig) -> uplinks.Uplink:
    """A connection of the route's own: a broker takes a second one of the same client id for the first, come back."""
    uplink = next(uplink for uplink in config.uplinks if uplink.name == route.uplink)
    return uplinks.make(uplink, client_id=f"fieldpost-{config.name}-{route.id}")


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
        return {
            "status": self.status,
            "add": self.add,
            "ledger": self.ledger,
            "replay": self.replay,
            "verify": self.verify,
            "page": self.page,
            "set-aside": self.set_aside,
        }

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

    async def replay(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send again to one route what is kept from a time on."""
        route = self._route(str(request.get("route", "")))
        since_ms, until_ms = _number(request, "since_ms"), _number(request, "until_ms")
        node = str(request.get("node") or "")
        return {"readings": await self._spool.replay(route.config.id, since_ms, until_ms, node)}

    async def verify(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Compare everything that is stored with its checksums."""
        report = await self._spool.verify()
        answer: dict[str, Any] = msgspec.to_builtins(report)
        return answer | {"is_whole": report.is_whole}

    async def page(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Some stored readings, for an export, and where the next page begins."""
        lane = LaneName(min(1, _number(request, "lane")))
        readings, following = await self._spool.page(lane, _number(request, "position"), PAGE_READINGS)
        return {"readings": [as_json(reading, self._spool.manifests) for reading in readings], "next": following}

    async def set_aside(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What far sides refused for good: look at it, try it again, or drop it."""
        wanted = request.get("ids")
        chosen = [one for one in await self._spool.refused() if not wanted or one.id in wanted]
        answer = []
        for one in chosen:
            outcome = ""
            if request.get("do") == "retry":
                outcome = await self._retry(one)
            elif request.get("do") == "drop":
                await self._spool.settle(one, dropped=True)
                outcome = "dropped"
            answer.append(
                {
                    "id": one.id,
                    "at_ms": one.at_ms,
                    "route": one.route,
                    "reason": one.reason,
                    "outcome": outcome,
                    "reading": as_json(one.reading, self._spool.manifests),
                }
            )
        return answer

    async def _retry(self, one: Refused) -> str:
        try:
            await self._route(one.route).deliver_again(one.reading)
        except (Rejected, Unreachable) as error:
            return f"still here: {error}"
        await self._spool.settle(one, dropped=False)
        return "delivered"

    def _route(self, id_: str) -> Route:
        for route in self._routes:
            if route.config.id == id_:
                return route
        there = ", ".join(f'"{route.config.id}"' for route in self._routes) or "none"
        raise ConfigError([f'no route "{id_}"; there are: {there}'])

    async def status(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that `fieldpost status` shows."""
        now, unix_ms = boottime_ms(), time.time_ns() // 1_000_000
        spool = await self._spool.status()
        routes = []
        for route in self._routes:
            status = msgspec.to_builtins(route.status())
            waiting = spool.routes[route.config.id]
            # An age only where there is a backlog. What drains is what goes beyond what comes in meanwhile.
            backlog = waiting.readings
            status |= {"backlog": backlog, "backfill": waiting.backfill, "urgent": waiting.urgent}
            status["backlog_bytes"] = waiting.bytes
            status["lag_s"] = max(0.0, (unix_ms - waiting.oldest_ms) / 1000) if backlog and waiting.oldest_ms else 0.0
            drains = status["rate"] - spool.readings_per_hour / 3600
            status["drain_min"] = backlog / drains / 60 if backlog and drains > 0 else None
            routes.append(status)
        return {
            "gateway": self._config.name,
            "version": __version__,
            "up_s": time.monotonic() - self._started,
            "state": self._session.state,
            "broker": {"kind": self._broker.kind, "listens": self._broker.listens},
            "spool": msgspec.to_builtins(spool) | {"card_life_years": self._card_life_years(spool)},
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

    def _card_life_years(self, spool: SpoolStatus) -> float | None:
        """How long the card lasts at today's rate if each of its cells bears CARD_CYCLES writes; None: not known."""
        try:
            disk = os.statvfs(self._config.data)
        except OSError:
            return None
        endurance = disk.f_blocks * disk.f_frsize * CARD_CYCLES / CARD_AMPLIFICATION
        return endurance / spool.card_bytes_per_day / 365 if spool.card_bytes_per_day else None


def _number(request: Mapping[str, Any], key: str) -> int:
    """A whole number of a request, 0 where it is none."""
    value = request.get(key, 0)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


def as_json(reading: Reading, manifests: Mapping[str, Manifest]) -> dict[str, Any]:
    """A reading as an export shows it: real values by the name of their channel, and what its date rests on."""
    shown: dict[str, Any] = {
        "id": reading.id,
        "node": reading.node,
        "install": reading.install,
        "boot": reading.boot,
        "seq": reading.seq,
        "time_ms": reading.time_ms,
        "error_ms": reading.error_ms,
        "time_quality": Quality(reading.quality).name.lower(),
        "uptime_ms": reading.uptime_ms,
    }
    if reading.event is not None:
        return shown | {"event": msgspec.to_builtins(reading.event), "values": list(reading.values)}
    manifest = manifests.get(reading.manifest)
    names = [(c.name, c.scale) for c in manifest.channels] if manifest else []
    names += [(f"column-{n}", 1) for n in range(len(names), len(reading.values))]
    return shown | {
        "values": {
            name: value / scale if isinstance(value, int) and scale != 1 else value
            for value, (name, scale) in zip(reading.values, names, strict=False)
            if value is not None
        }
    }
