"""The configuration: every fault at once, by path, with what is allowed."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from fieldpost.config import load, parse
from fieldpost.errors import ConfigError

REPO = Path(__file__).parents[2]


def faults(text: str, folder: Path) -> list[str]:
    path = folder / "gateway.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    return list(caught.value.faults)


def test_the_example_that_explains_every_setting_is_right(tmp_path: Path) -> None:
    example = (REPO / "deploy" / "gateway.toml").read_text()
    secret = tmp_path / "plant.password"
    secret.write_text("s3cret\n")
    secret.chmod(0o600)
    path = tmp_path / "gateway.toml"
    path.write_text(example.replace("/etc/fieldpost/plant.password", str(secret)))
    config = load(path)
    assert [uplink.kind for uplink in config.uplinks] == ["amqp", "mqtt"]
    assert config.uplinks[0].password == "s3cret"
    assert "s3cret" not in repr(config)


def test_every_setting_is_explained_in_the_example() -> None:
    example = (REPO / "deploy" / "gateway.toml").read_text()
    settings = set(re.findall(r'table\.\w+\("(\w+)"', (REPO / "edge/fieldpost/config.py").read_text()))
    assert len(settings) > 40
    assert [name for name in sorted(settings) if not re.search(rf"^(# )?{name} = ", example, re.MULTILINE)] == []


def test_the_example_shows_the_defaults() -> None:
    example = tomllib.loads((REPO / "deploy" / "gateway.toml").read_text())
    plain = {
        "uplinks": [{"name": "plant", "kind": "mqtt", "url": "mqtt://h"}],
        "routes": [{"id": "r", "uplink": "plant"}],
    }
    shown = parse({"spool": example["spool"], "broker": example["broker"], **plain}, Path("/"))
    route = {
        "id": "r",
        "uplink": "plant",
        **{k: v for k, v in example["routes"][0].items() if k not in ("id", "uplink")},
    }
    with_route = parse({**plain, "routes": [route]}, Path("/"))
    default = parse(plain, Path("/"))
    assert (shown.spool, shown.broker) == (default.spool, default.broker)
    assert with_route.routes == default.routes


def test_an_empty_file_is_a_gateway_on_loopback() -> None:
    config = parse({}, Path("/"))
    assert (config.broker.kind, config.broker.host, config.broker.port) == ("mosquitto", "127.0.0.1", 1883)
    assert config.routes == ()


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "open.password").write_text("x")
    (tmp_path / "open.password").chmod(0o644)
    told = faults(
        """
        [gateway]
        nmae = "farm"
        [broker]
        kind = "mosquito"
        listen = "1883"
        [spool]
        linger_s = -1
        max_bytes = "lots"
        [[uplinks]]
        name = "plant"
        kind = "amqp"
        url = "mqtt://u:geheim@host"
        password_file = "open.password"
        [[uplinks]]
        name = "plant"
        kind = "mqtt"
        url = "mqtt://host"
        [[routes]]
        id = "all"
        uplink = "azure"
        [[routes]]
        uplink = "plant"
        """,
        tmp_path,
    )
    for expected in (
        'gateway.nmae: no such setting here; did you mean "name"?',
        "broker.kind: 'mosquito' is not one of 'mosquitto', 'embedded', 'external'",
        "broker.listen: '1883' is not like 127.0.0.1:1883",
        "spool.linger_s: must be a number from 0 to 60, not -1",
        'spool.max_bytes: must be a size such as "500MB" or "2GiB", not \'lots\'',
        "uplinks[0].url: 'mqtt://u:...@host' is not like amqp://host:port",
        "uplinks[0].url: a password does not belong here; put it into a file and name it as password_file",
        'uplinks[1].name: "plant" is there twice',
        'routes[0].uplink: no uplink "azure"; there are: "plant", "plant"',
        "routes[1].id: is missing",
    ):
        assert expected in told
    assert any("open.password can be read by others; `chmod 600" in fault for fault in told)
    assert not any("geheim" in fault for fault in told)


def test_a_file_that_is_not_there_or_no_toml_is_told_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        load(tmp_path / "none.toml")
    assert "gateway.toml" in faults("[gateway", tmp_path)[0]


@pytest.mark.parametrize(
    "text", ["gateway = 3", "uplinks = 3", "routes = [3]", "[broker]\nkind = 3", "spool.linger_s = true"]
)
def test_wrong_types_are_faults_and_no_crash(text: str, tmp_path: Path) -> None:
    assert faults(text, tmp_path)
