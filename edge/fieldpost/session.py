"""The gateway's session with the nodes' broker: two connections that come and go together.

*Intake* carries rows up, with acknowledgement by hand, and acks down: an ack and the PUBACK that follows it then leave
in one piece. *Control* carries the nodes' states up, and the time and the gateway's own state down; its last will tells
the nodes to hold on when the gateway is gone.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time

from . import wire
from .broker import CONTROL, INTAKE, Broker
from .clock import synchronised
from .errors import Malformed, Unreachable
from .forward import Pause
from .ingest import Ingest, boottime_ms
from .mqtt import Connection, Incoming, connect
from .nodes.presence import Presence
from .nodes.time import Dating
from .spool import Spool
from .wire import ROOT

log = logging.getLogger(__name__)

TIME_EVERY_S = 30.0
CLOCK_EVERY_S = 1.0
ROOM_EVERY_S = 0.25
USUAL_ACK_S = 25
"""Nodes send again after 30 s without an ack, unless they are told that it may take longer."""

PRECISION_MS = 20
"""What the way from our clock to a node's may add to the time that we publish."""


class Session:
    """Serves the nodes until cancelled, over as many connections as it takes."""

    def __init__(self, broker: Broker, spool: Spool, ingest: Ingest, presence: Presence, dating: Dating) -> None:
        self._broker = broker
        self._spool = spool
        self._ingest = ingest
        self._presence = presence
        self._dating = dating
        self._control: Connection | None = None
        self._attempt = 0
        self.state = "lost"

    async def run(self) -> None:
        """Connect, serve, and connect again whenever a connection is lost."""
        pause = Pause(0.1, 5.0)
        told = False
        while True:
            try:
                await self._serve(pause)
            except* Unreachable as lost:
                if not told or self.state != "lost":
                    log.warning("nodes' broker lost: %s", lost.exceptions[0])
                told = True
            finally:
                self.state = "lost"
                self._control = None
                self._ingest.forget_pending()
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                # Cancelled in the moment of the loss: a TaskGroup of Python 3.11 tells of the loss only.
                raise asyncio.CancelledError
            await asyncio.sleep(pause.longer())

    async def _serve(self, pause: Pause) -> None:
        lost = wire.encode_gateway_state("lost")
        # rumqttd takes a new connection down with the old one of the same id; our mosquitto goes by the user name.
        self._attempt += 1
        control_id, intake_id = f"{CONTROL}.{self._attempt}", f"{INTAKE}.{self._attempt}"
        async with (
            asyncio.TaskGroup() as parts,
            connect(
                self._broker.address(CONTROL), control_id, self._take_control, will=(wire.GATEWAY_STATE, lost)
            ) as control,
        ):
            self._control = control
            await control.subscribe([(f"{ROOT}/+/state", 1)])
            intake: Connection
            async with connect(
                self._broker.address(INTAKE), intake_id, lambda m: self._ingest.take(intake, m)
            ) as intake:
                await intake.subscribe([(f"{ROOT}/+/manifest", 1), (f"{ROOT}/+/data", 1)])
                pause.reset()
                tasks = [
                    parts.create_task(control.lost(), name="control"),
                    parts.create_task(intake.lost(), name="intake"),
                    parts.create_task(self._ingest.acknowledge(intake), name="acknowledge"),
                    parts.create_task(self._tell_time(control), name="time"),
                    parts.create_task(self._tell_room(control), name="room"),
                ]
                try:
                    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    await self._leave(control, lost)
                    for task in tasks:
                        task.cancel()

    async def _leave(self, control: Connection, lost: bytes) -> None:
        """A clean end sends no last will, so say it ourselves."""
        self.state = "lost"
        if not control.is_lost:
            try:
                async with asyncio.timeout(2):
                    await control.publish_and_wait(wire.GATEWAY_STATE, lost, retain=True)
            except (Unreachable, TimeoutError):
                pass

    def _take_control(self, message: Incoming) -> None:
        """A node's state or last will."""
        control = self._control
        if message.topic == wire.GATEWAY_STATE:
            self._mind_own_state(control, message)
            return
        try:
            node, leaf = wire.parse_topic(message.topic)
            if leaf != "state":
                raise Malformed("topic", leaf[:40])
            if not message.payload:  # a retained state was cleared: the node is no longer there
                self._presence.nodes.pop(node, None)
            else:
                self._take_state(control, node, wire.parse_state(message.payload), live=not message.retained)
        except Malformed as malformed:
            self._ingest.reject(message, malformed)
        except Unreachable as lost:
            log.debug("control: %s", lost)  # the session ends by the connection's own word
        if control is not None:
            control.acknowledge(message.mid)

    def _mind_own_state(self, control: Connection | None, message: Incoming) -> None:
        """Our own state comes back, since it is a node's topic by form: the will of a connection that died earlier
        may come after the `up` of this one, and nodes would believe it."""
        if control is None:
            return
        control.acknowledge(message.mid)
        said = self._said(self.state)
        if self.state != "lost" and message.payload != said and not message.retained:
            control.publish(wire.GATEWAY_STATE, said, retain=True)

    def _take_state(self, control: Connection | None, node: str, state: wire.State, *, live: bool) -> None:
        now = boottime_ms()
        event = self._presence.take(node, state, now, live=live)
        if event is not None and self._spool.room:
            self._spool.report(event)
            log.info("node %s: %s", node, state.st)
        if state.st == "up":
            if live and state.uptime_ms is not None:
                self._dating.hear(node, state.install, state.boot, state.uptime_ms, now)
            if control is not None:
                self._ingest.acknowledge_again(control, node, state.install)
                if live:
                    self._publish_time(control)

    async def _tell_time(self, control: Connection) -> None:
        """Tell the nodes what time it is, now and then, and at once when our own clock was set."""
        told, era = 0.0, -1
        while True:
            self._ingest.synchronised = synchronised()
            self._spool.observe_clock(self._ingest.synchronised)
            if time.monotonic() - told >= TIME_EVERY_S or self._spool.era != era:
                told, era = time.monotonic(), self._spool.era
                self._publish_time(control)
            await asyncio.sleep(CLOCK_EVERY_S)

    def _publish_time(self, control: Connection) -> None:
        payload = wire.encode_time(time.time_ns() // 1_000_000, PRECISION_MS, synchronised())
        control.publish(wire.GATEWAY_TIME, payload, qos=0)

    async def _tell_room(self, control: Connection) -> None:
        """Publish `up` or `full` as the spool has room; the nodes go on sampling and send when it is `up`."""
        told = ""
        while True:
            state = self._room_state(told)
            if state != told:
                control.publish(wire.GATEWAY_STATE, self._said(state), retain=True)
                self.state = told = state
                log.info(
                    "taking readings" if state == "up" else "the spool has no room: nodes hold on to their readings"
                )
            await asyncio.sleep(ROOM_EVERY_S)

    def _said(self, state: str) -> bytes:
        within_s = math.ceil(self._spool.safe_within_s)
        return wire.encode_gateway_state(state, within_s + 5 if state == "up" and within_s > USUAL_ACK_S else 0)

    def _room_state(self, told: str) -> str:
        """Full below a tenth of the stage, up again from a half: it should not flutter."""
        room = self._spool.room / self._spool.stage_readings
        if told == "full":
            return "up" if room >= 0.5 else "full"
        return "up" if room >= 0.1 else "full"
