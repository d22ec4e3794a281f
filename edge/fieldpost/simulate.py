"""Simulated nodes: the real node code, each in a process of its own, or many in one."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .firmware import firmware_folder, micropython, umqtt_folder

PR_SET_PDEATHSIG = 1
STOPPED_WITHIN_S = 5.0
HEAP = "512k"
"""About what a board has twice over; a node runs in a quarter of it."""


def write_settings(folder: Path, enrolled: Mapping[str, Any], rate: float, more: Mapping[str, Any]) -> None:
    """A node's folder: who it is, where it connects to, `rate` rows a second. Only its owner can read it."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    settings = {
        "node": enrolled["node"],
        "key": enrolled["key"],
        "gateways": [[enrolled["host"], enrolled["port"]]],
        "period_ms": max(20, round(1000 / rate)),
        "sensors": ["simulated:climate"],
        "fw": "simulated",
        **more,
    }
    path = folder / "settings.json"
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(settings, file)


class SimulatedNode:
    """One node in a process: MicroPython, or CPython where there is none. It dies with this process."""

    def __init__(self, folder: Path, prefix: Sequence[str] = ()) -> None:
        """`prefix` is put before the command, for example to run it in a network namespace."""
        self.folder = folder
        self.log = folder / "node.log"
        self._prefix = tuple(prefix)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> SimulatedNode:
        """Start it; a node that was killed starts its next boot.

        Call it from a thread that lives as long as the node should: to the kernel, the parent is the thread.
        """
        program = micropython()
        command = [program, "-X", f"heapsize={HEAP}"] if program else [sys.executable]
        device, umqtt = str(firmware_folder()), str(umqtt_folder())
        paths = {"MICROPYPATH": f"{device}:{umqtt}:.frozen", "PYTHONPATH": f"{device}:{umqtt}"}
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                [*self._prefix, *command, f"{device}/main.py", str(self.folder)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**os.environ, **paths, "PYTHONUNBUFFERED": "1"},
                preexec_fn=end_with_parent(signal.SIGKILL),
                start_new_session=True,  # Ctrl-C in a terminal is for us; we tell the node
            )
        return self

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """End it as a power cut does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """End it as Ctrl-C does: it says goodbye and spills what it holds."""
        process, self._process = self._process, None
        if process is not None:
            _interrupt([process], STOPPED_WITHIN_S)

    def pause(self) -> None:
        """Hold it still: its connections stay open, it says nothing."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)


class ProcessNodes:
    """Many nodes, each in a process of its own."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._nodes = [SimulatedNode(folder) for folder in folders]

    def start(self) -> None:
        for node in self._nodes:
            node.start()

    def stop(self) -> None:
        """All say goodbye at the same time; returns when they have ended, by force where they took too long."""
        running = [process for node in self._nodes if (process := node._process) is not None]
        _interrupt(running, STOPPED_WITHIN_S + 0.05 * len(running))

    def ended(self) -> list[str]:
        """The nodes that ended by themselves, which none should, by the name of their folder."""
        return [node.folder.name for node in self._nodes if not node.alive]


class LightNodes:
    """Many nodes in this process: the same node code under CPython, a thread each."""

    def __init__(self, folders: Sequence[Path]) -> None:
        for path in (str(umqtt_folder()), str(firmware_folder())):
            if path not in sys.path:
                sys.path.insert(0, path)
        import main as node  # type: ignore[import-not-found]  # the firmware's
        import settings as node_settings  # type: ignore[import-not-found]

        self._nodes = [node.Node(node_settings.load(str(f)), str(f), say=_Log(f / "node.log")) for f in folders]
        self._threads = [
            threading.Thread(target=one.run, name=f.name, daemon=True)
            for f, one in zip(folders, self._nodes, strict=True)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """All say goodbye; returns when they have, or after 10 s."""
        for node in self._nodes:
            node.stop()
        deadline = time.monotonic() + 10
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))

    def ended(self) -> list[str]:
        """The nodes that ended by themselves, which none should, by the name of their folder."""
        return [thread.name for thread in self._threads if not thread.is_alive()]


class _Log:
    """What a node says, into a file of its own."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, text: str) -> None:
        with self._path.open("a") as file:
            file.write(text + "\n")


def _interrupt(processes: Sequence[subprocess.Popen[bytes]], within_s: float) -> None:
    """Ctrl-C to all of them, once: a second one would break off the goodbye. By force after `within_s`."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + within_s
    for process in processes:
        try:
            process.wait(max(0.01, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# Looked up before any fork: between fork and exec a child of a process with threads must not wait for a lock.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def end_with_parent(number: signal.Signals) -> Callable[[], None]:
    """For `preexec_fn`: the child gets the signal `number` when we die, however we die."""
    parent, how = os.getpid(), int(number)

    def ask_the_kernel() -> None:
        if _prctl is not None:
            _prctl(PR_SET_PDEATHSIG, how)
            if os.getppid() != parent:  # we died before the kernel knew
                os._exit(1)

    return ask_the_kernel
