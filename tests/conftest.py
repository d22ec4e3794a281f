"""The servers and our own parts, each real, on loopback, in a folder of its own, ended with its test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from parts import Gateway
from servers import Mosquitto, RabbitMQ, shared_rabbitmq


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    """A mosquitto that is no part of the gateway: an upstream."""
    with Mosquitto(tmp_path / "upstream") as server:
        yield server


@pytest.fixture(scope="session")
def rabbitmq() -> RabbitMQ:
    """One RabbitMQ for all tests, since it takes seconds to start; tests use queues of their own."""
    return shared_rabbitmq()


@pytest.fixture
def make_gateway(tmp_path: Path) -> Iterator[Callable[..., Gateway]]:
    """Gateways that are not started yet: `make_gateway(uplinks, kind=..., spool=...)`."""
    made: list[Gateway] = []

    def make(uplinks: str = "", **settings: str) -> Gateway:
        made.append(Gateway(tmp_path / f"gateway-{len(made)}", uplinks, **settings))
        return made[-1]

    yield make
    for gateway in made:
        gateway.end()


@pytest.fixture
def gateway(make_gateway: Callable[..., Gateway]) -> Gateway:
    """A running gateway without uplinks: it keeps what it is given."""
    return make_gateway().start()
