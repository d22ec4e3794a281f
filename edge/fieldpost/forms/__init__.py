"""What a message looks like: one file a form, each with `encode`, `decode` and its content type."""

from __future__ import annotations

from collections.abc import Iterator

from . import columns, senml
from .arrived import Arrived, unpacked

__all__ = ["FORMS", "Arrived", "decode"]

FORMS = {"senml": senml, "columns": columns}


def decode(body: bytes) -> Iterator[Arrived]:
    """The rows of a message in any of our forms, zlib'd or plain. Raises Malformed where it is none."""
    plain = unpacked(body)
    return senml.decode(plain) if plain.startswith(b"[") else columns.decode(plain)
