"""What CPython lacks of MicroPython, for tests and for `fieldpost simulate --light`. Never copied to a board."""

import binascii
import socket
import struct
import sys


def install():
    """Make `umqtt.simple` 1.3.4 importable: it asks for MicroPython's old module names."""
    for name, module in (("usocket", socket), ("ustruct", struct), ("ubinascii", binascii)):
        sys.modules.setdefault(name, module)
