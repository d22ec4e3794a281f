"""What is measured with: processor time, memory, bytes that reach a disk, bytes at the IP layer of a line."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
SECTOR = 512


def cpu_seconds(*pids: int) -> float:
    """Processor time, in user space and in the kernel, of these processes so far."""
    total = 0
    for pid in pids:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(stat[11]) + int(stat[12])
    return total / TICKS


def rss_mb(*pids: int, peak: bool = False) -> float:
    """Memory that these processes occupy, now or at the most so far."""
    name = "VmHWM" if peak else "VmRSS"
    lines = [re.search(rf"{name}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text()) for pid in pids]
    return sum(int(line[1]) for line in lines if line) / 1024


def folder_bytes(folder: Path) -> int:
    """What the files of a folder occupy on the disk."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


class Disk:
    """A new ext4 on a loop device of its own: `written()` counts whatever reaches it, its own journal included.

    Only root may make one. Its tables are made whole at once, for what ext4 makes up for later is nobody's reading.
    """

    def __init__(self, mebibytes: int = 512) -> None:
        self._mebibytes = mebibytes
        self._device = ""
        self._mounted = False
        self._beating = threading.Event()
        self._beat: threading.Thread | None = None

    def __enter__(self) -> Disk:
        if os.geteuid() != 0:
            raise SystemExit("this topic makes a loop device with a file system: run it as root")
        self._folder = Path(tempfile.mkdtemp(prefix="fieldpost-disk-"))
        self.mount = self._folder / "mount"
        self.mount.mkdir()
        try:
            image = self._folder / "image"
            with image.open("wb") as file:
                file.truncate(self._mebibytes * 1024 * 1024)
            self._device = _say("losetup", "--find", "--show", str(image)).strip()
            _say("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", self._device)
            _say("mount", self._device, str(self.mount))
            self._mounted = True
            self._root = os.open(self.mount, os.O_RDONLY)
        except BaseException:
            self._undo()
            raise
        return self

    def __exit__(self, *why: object) -> None:
        self.still()
        os.close(self._root)
        self._undo()

    def _undo(self) -> None:
        if self._mounted:
            subprocess.run(["umount", "--lazy", str(self.mount)], check=False)
        if self._device:
            subprocess.run(["losetup", "--detach", self._device], check=False)
        shutil.rmtree(self._folder, ignore_errors=True)

    def sync(self) -> None:
        """Write what the file system holds, and commit its journal (syncfs(2))."""
        if ctypes.CDLL(None, use_errno=True).syncfs(self._root) != 0:
            raise OSError(ctypes.get_errno(), "syncfs")

    def written(self) -> int:
        """Bytes that reached the device so far, after a `sync`."""
        self.sync()
        return sectors_written(Path(f"/sys/block/{Path(self._device).name}/stat").read_text()) * SECTOR

    def beat(self, every_s: float) -> None:
        """Commit the journal so often from now on: what ext4 does every 5 s of a day that does not run fast."""
        self._beating.set()

        def run() -> None:
            pause = threading.Event()
            while self._beating.is_set():
                self.sync()
                pause.wait(every_s)

        self._beat = threading.Thread(target=run, name="beat", daemon=True)
        self._beat.start()

    def still(self) -> None:
        """No beat any more."""
        self._beating.clear()
        if self._beat is not None:
            self._beat.join()
            self._beat = None


def sectors_written(stat: str) -> int:
    """The seventh field of /sys/block/*/stat (kernel, Documentation/block/stat.rst)."""
    return int(stat.split()[6])


def _say(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@dataclass(frozen=True, slots=True)
class Traffic:
    """What went over a line: packets, bytes of TCP payload, and bytes at the IP layer."""

    packets: int = 0
    payload: int = 0
    ip: int = 0

    def __sub__(self, before: Traffic) -> Traffic:
        return Traffic(self.packets - before.packets, self.payload - before.payload, self.ip - before.ip)


MTU = 1500
ETH_P_IP = 0x0800
SO_ATTACH_FILTER = 26
SO_RCVBUFFORCE = 33


class Line:
    """Counts what goes over loopback to and from a TCP port, both ways, headers of IP and TCP included.

    Loopback carries packets of 64 KiB; one that is larger than a line's MTU is counted as the packets that it would
    have been. Only root may listen so.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._seen = Traffic()
        self._lock = threading.Lock()

    def __enter__(self) -> Line:
        if os.geteuid() != 0:
            raise SystemExit("this topic listens to packets: run it as root")
        # A socket for one protocol is given what arrives, not what is sent: on loopback each packet once.
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_IP))
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 * 1024 * 1024)
        _take_only(self._socket, self._port)
        self._socket.bind(("lo", ETH_P_IP))
        self._socket.settimeout(0.1)
        self._listening = True
        self._thread = threading.Thread(target=self._listen, name="line", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *why: object) -> None:
        self._listening = False
        self._thread.join()
        self._socket.close()

    def seen(self) -> Traffic:
        """Everything so far."""
        with self._lock:
            return self._seen

    def _listen(self) -> None:
        while self._listening:
            with contextlib.suppress(TimeoutError):
                packet = self._socket.recv(120)
                if (one := tcp_traffic(packet, self._port)) is not None:
                    with self._lock:
                        a = self._seen
                        self._seen = Traffic(a.packets + one.packets, a.payload + one.payload, a.ip + one.ip)


def tcp_traffic(packet: bytes, port: int) -> Traffic | None:
    """A packet by its headers (RFC 791, RFC 9293); None where it is not TCP to or from `port`."""
    if len(packet) < 40 or packet[0] >> 4 != 4 or packet[9] != socket.IPPROTO_TCP:
        return None
    (length,) = struct.unpack_from("!H", packet, 2)
    ip_head = (packet[0] & 0x0F) * 4
    if port not in struct.unpack_from("!HH", packet, ip_head):
        return None
    heads = ip_head + (packet[ip_head + 12] >> 4) * 4
    payload = length - heads
    packets = max(1, -(-payload // (MTU - heads)))
    return Traffic(packets, payload, payload + packets * heads)


def _take_only(listener: socket.socket, port: int) -> None:
    """Have the kernel leave out whatever is not to or from a port of TCP, by a classic BPF program."""
    code = [
        (0xB1, 0, 0, 0),  # ldxb 4*([0]&0xf): where TCP begins
        (0x48, 0, 0, 0),  # ldh [x+0]: from which port
        (0x15, 2, 0, port),  # jeq: take
        (0x48, 0, 0, 2),  # ldh [x+2]: to which port
        (0x15, 0, 1, port),  # jeq: take, else leave
        (0x06, 0, 0, 0xFFFF),
        (0x06, 0, 0, 0),
    ]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in code))
    # struct sock_fprog; the kernel copies what it points to.
    listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", len(code), ctypes.addressof(program)))


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for the time of a topic."""
    with tempfile.TemporaryDirectory(prefix="fieldpost-bench-") as name:
        yield Path(name)
