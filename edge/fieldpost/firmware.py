"""Where the node's firmware and what it needs are found on this machine."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.resources import files
from pathlib import Path

from .errors import ConfigError

_PACKAGE = Path(str(files(__package__)))
_CHECKOUT = _PACKAGE.parent.parent


def firmware_folder() -> Path:
    """The node's files: from the wheel, or from the checkout that this runs in."""
    for folder in (_PACKAGE / "firmware", _CHECKOUT / "device"):
        if (folder / "main.py").exists():
            return folder
    raise ConfigError([f"firmware: not found beside {_PACKAGE}; install fieldpost again"])


def umqtt_folder() -> Path:
    """The folder that has umqtt/simple.py. Raises ConfigError.

    It is $FIELDPOST_UMQTT, where the Makefile puts it, or share/fieldpost/upy of the environment that this runs in.
    """
    named = os.environ.get("FIELDPOST_UMQTT")
    shared = Path(sys.prefix) / "share" / "fieldpost" / "upy"
    built = Path("build") / "upy"
    for folder in (Path(named) if named else None, _CHECKOUT / built, shared, Path.cwd() / built):
        if folder is not None and (folder / "umqtt" / "simple.py").exists():
            return folder
    raise ConfigError(
        [
            "umqtt.simple: not found; in a checkout `make build/upy/umqtt/simple.py` fetches it, elsewhere "
            "`pipkin --dir FOLDER install --no-mp-org micropython-umqtt.simple` and FIELDPOST_UMQTT=FOLDER"
        ]
    )


def micropython() -> str | None:
    """The MicroPython of this machine, or None where there is none (no wheel for this processor)."""
    beside = Path(sys.executable).with_name("micropython")
    return str(beside) if beside.exists() else shutil.which("micropython")
