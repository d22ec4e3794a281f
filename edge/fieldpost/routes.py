"""Which reading goes where, as what: a route's batch becomes a message. Plain functions, no I/O."""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Mapping, Sequence

from .forms import FORMS
from .reading import Manifest, Reading
from .uplinks.base import Message

COMPRESS_FROM_BYTES = 120
"""Below this zlib's dictionary has nothing to work with and the result is longer."""


def message(
    readings: Sequence[Reading], manifests: Mapping[str, Manifest], lane: str = "", form: str = "senml"
) -> Message:
    """The message for a batch; the same batch gives the same id. `lane`: what it is when it is not live."""
    body = FORMS[form].encode(readings, manifests, lane)
    encoding = ""
    if len(body) >= COMPRESS_FROM_BYTES:
        body, encoding = zlib.compress(body, 6), "deflate"
    return Message(message_id(readings), body, FORMS[form].CONTENT_TYPE, encoding, len(readings))


def message_id(readings: Sequence[Reading]) -> str:
    """A single reading's own id; of more, 72 bits of a digest over all ids: it travels with every message."""
    if len(readings) == 1:
        return readings[0].id
    digest = hashlib.sha256("\n".join(reading.id for reading in readings).encode()).digest()
    return base64.urlsafe_b64encode(digest[:9]).decode()
