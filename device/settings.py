"""A node's settings: one JSON file, read once, with every fault told."""

import json

NODE_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789-"
HEX = "0123456789abcdef"


class SettingsError(Exception):
    """The settings can't be used; the text has each fault with its name."""


# name: (default, lowest, highest). Milliseconds, seconds and bytes are in the names.
NUMBERS = {
    "period_ms": (60000, 20, 86400000),
    "keepalive_s": (60, 3, 600),
    "timeout_s": (10, 1, 60),
    "ack_wait_s": (30, 1, 600),
    "longest_ack_wait_s": (600, 1, 3600),
    "first_wait_ms": (500, 10, 60000),
    "longest_wait_ms": (60000, 50, 600000),
    "rows_per_message": (20, 1, 100),
    "outbox_rows": (256, 8, 65536),
    "outbox_bytes": (393216, 4096, 67108864),
    "spill_after_s": (60, 0, 86400),
}


class Settings:
    """Every setting as an attribute, in range. `gateways` are (host, port), tried in order."""

    def __init__(self, raw):
        faults = []
        if not isinstance(raw, dict):
            raise SettingsError("settings: must be an object")
        self.node = raw.get("node", "")
        if not isinstance(self.node, str) or not 1 <= len(self.node) <= 32 or _other(self.node, NODE_LETTERS):
            faults.append("node: must be 1-32 of a-z 0-9 -")
        self.key = raw.get("key", "")
        if not isinstance(self.key, str) or not self.key:
            faults.append("key: is missing")
        self.install = raw.get("install")
        if self.install is not None and not is_install(self.install):
            faults.append("install: must be 12 hex digits")
        self.gateways = _gateways(raw.get("gateways"), faults)
        self.sensors = raw.get("sensors", ["simulated:climate"])
        self.groups = raw.get("groups", [])
        self.verbose = raw.get("verbose") is True
        self.firmware = str(raw.get("fw", ""))[:32]
        for name in NUMBERS:
            default, low, high = NUMBERS[name]
            value = raw.get(name, default)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                faults.append("%s: must be a number from %d to %d" % (name, low, high))
            setattr(self, name, value)
        if faults:
            raise SettingsError("; ".join(faults))


def load(folder):
    """The settings in `folder`/settings.json. Raises SettingsError."""
    path = folder + "/settings.json"
    try:
        with open(path) as file:
            raw = json.load(file)
    except (OSError, ValueError) as error:
        raise SettingsError("%s: %s" % (path, error))
    return Settings(raw)


def is_install(value):
    """Whether `value` is an install id: 12 lower hex digits."""
    return isinstance(value, str) and len(value) == 12 and not _other(value, HEX)


def _other(text, letters):
    return any(letter not in letters for letter in text)


def _gateways(raw, faults):
    gateways = []
    for one in raw if isinstance(raw, list) else []:
        if isinstance(one, list) and len(one) == 2 and isinstance(one[0], str) and isinstance(one[1], int):
            gateways.append((one[0], one[1]))
    if not 1 <= len(gateways) <= 2 or len(gateways) != len(raw):
        faults.append("gateways: must be one or two of [host, port]")
    return gateways
