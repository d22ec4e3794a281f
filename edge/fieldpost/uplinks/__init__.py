"""The far sides: one file a kind, all on the contract of `base`."""

from __future__ import annotations

from ..config import UplinkConfig
from .base import Message, Uplink, UplinkStatus

__all__ = ["Message", "Uplink", "UplinkStatus", "make"]


def make(config: UplinkConfig, client_id: str) -> Uplink:
    """The uplink of a configuration, not open yet; only the library that it needs is loaded."""
    if config.kind == "amqp":
        from .amqp import AmqpSettings, AmqpUplink

        return AmqpUplink(
            AmqpSettings(
                url=config.url,
                username=config.username,
                password=config.password,
                exchange=config.exchange,
                routing_key=config.routing_key,
                queue=config.queue,
                declare=config.declare,
                queue_type=config.queue_type,
                durable=config.durable,
                timeout_s=config.timeout_s,
                heartbeat_s=config.heartbeat_s,
            )
        )
    from .mqtt import MqttSettings, MqttUplink

    return MqttUplink(
        MqttSettings(
            url=config.url,
            username=config.username,
            password=config.password,
            client_id=client_id,
            topic=config.topic,
            version=config.version,
            timeout_s=config.timeout_s,
            keepalive_s=config.heartbeat_s,
        )
    )
