"""The outbox: rows that the gateway has not acknowledged yet, in RAM and on flash, oldest first.

A row is in RAM until it is spilled: then it is in a *segment*, a file of about one flash block that is written once,
whole, and never changed. `ack` frees; what must be given up (oldest first) is remembered as a drop until that is
acknowledged too. DESIGN.md beside this file says why it is so.
"""

import binascii
import json
import os

from clock import write_whole

SEGMENT_BYTES = 4000
"""A littlefs block is 4096 bytes; a larger file costs another one."""


class Message:
    """Rows of one boot for one `data` message: `rows` are (seq, uptime_ms, values), seqs without a hole from `first`.

    `held` is the oldest seq of the boot that is kept, `drops` what was given up, `anchor` the time as an older boot
    knew it.
    """

    def __init__(self, boot, current, first, rows, held, drops, anchor, manifest):
        self.boot = boot
        self.current = current
        self.first = first
        self.rows = rows
        self.held = held
        self.drops = drops
        self.anchor = anchor
        self.manifest = manifest

    def last(self):
        """The (boot, seq) up to which this message tells everything."""
        return self.boot, self.first + len(self.rows) - 1


class Outbox:
    """All boots' rows. `folder` is made where it is missing; `manifest` is (payload, hash) of this boot's rows."""

    def __init__(self, folder, boot, manifest, rows=256, max_bytes=393216, spill_after_ms=60000):
        self._folder = folder
        self.boot = boot
        self._manifest, self.manifest_hash = manifest
        self._max_rows = rows
        self._max_bytes = max_bytes
        self._spill_after_ms = spill_after_ms
        self._ram = []
        self._next = 0
        self._drops = {}
        self._anchors = {}
        self._segments = []  # [boot, first, last, bytes], oldest first
        self._loaded = None  # (segment's path, rows) of the one that is being sent
        self.newest_sent = (-1, -1)
        self.flash_faults = 0
        self._open()

    # What comes in.

    def put(self, uptime_ms, values):
        """Keep a new row; returns its seq. At the limit the oldest row is dropped and counted."""
        seq = self._next
        self._next += 1
        if len(self._ram) >= self._max_rows * 3 // 4:
            self.spill()
        if len(self._ram) >= self._max_rows:
            self._drop(self.boot, self._ram[0][0], self._ram[0][0])
            del self._ram[0]
        self._ram.append((seq, uptime_ms, values))
        return seq

    def know_time(self, uptime_ms, unix_ms, precision_ms):
        """Put down what time it was at `uptime_ms`, for a next boot that has to date the rows of this one."""
        self._anchors[self.boot] = [uptime_ms, unix_ms, precision_ms]
        self._write_notes()

    def tend(self, uptime_ms):
        """Spill rows that have waited in RAM for too long; call it now and then while they can't be sent."""
        if self._ram and uptime_ms - self._ram[0][1] >= self._spill_after_ms:
            self.spill()

    def spill(self):
        """Write the rows in RAM to segments. After a fault of the flash they stay in RAM."""
        while self._ram:
            lines, size = [], 0
            for row in self._ram:
                line = _seal(json.dumps([row[0], row[1], row[2]]))
                if lines and size + len(line) > SEGMENT_BYTES:
                    break
                lines.append(line)
                size += len(line)
            if not self._make_room(size):
                return
            first, last = self._ram[0][0], self._ram[len(lines) - 1][0]
            try:
                self._keep_manifest()
                write_whole(
                    self._path(self.boot, first, last), _seal(json.dumps([self.manifest_hash])) + "".join(lines)
                )
            except OSError:
                self.flash_faults += 1
                return
            self._segments.append([self.boot, first, last, size])
            self._ram = self._ram[len(lines) :]

    # What goes out.

    def next(self, sent, limit):
        """The Message after `sent` = (boot, seq), or None. Only of the oldest boot that has anything left.

        A newer boot's rows wait until the older boot's are acknowledged: `ack` is cumulative, so it would free
        an older row that is lost on the way.
        """
        boot = self._oldest_boot()
        if boot is None:
            return None
        after = sent[1] if sent[0] == boot else -1
        if sent[0] > boot:
            return None
        rows, manifest = self._rows_after(boot, after, limit)
        drops = self._drops.get(boot, [])
        if rows:
            first = rows[0][0]
        elif drops and drops[-1][1] > after and not self._has_rows(boot):
            first = drops[-1][1] + 1
        else:
            return None
        held = self._held(boot)
        return Message(
            boot,
            boot == self.boot,
            first,
            rows,
            first if held is None else held,
            [list(drop) for drop in drops],
            self._anchors.get(boot),
            manifest,
        )

    def manifest_payload(self, hash_):
        """What the columns of rows with this manifest mean, or None where that is not known any more."""
        if hash_ == self.manifest_hash:
            return self._manifest
        try:
            with open(self._folder + "/manifest-" + hash_) as file:
                return file.read().encode()
        except OSError:
            return None

    def acked(self, boot, seq):
        """Everything up to and with (boot, seq) is durable: free it."""
        to = (boot, seq)
        self._ram = [row for row in self._ram if (self.boot, row[0]) > to]
        kept = []
        for segment in self._segments:
            if (segment[0], segment[2]) <= to:
                self._remove(self._path(segment[0], segment[1], segment[2]))
            else:
                kept.append(segment)
        self._segments = kept
        changed = False
        for old in list(self._drops):
            left = [drop for drop in self._drops[old] if (old, drop[1]) > to]
            changed = changed or len(left) != len(self._drops[old])
            if left:
                self._drops[old] = left
            else:
                del self._drops[old]
        for old in list(self._anchors):
            if old < self.boot and not self._has_rows(old) and old not in self._drops:
                del self._anchors[old]
                changed = True
        if changed:
            self._write_notes()
        self._forget_manifests()

    def __len__(self):
        """Rows that are kept."""
        return len(self._ram) + sum(last - first + 1 for _, first, last, _ in self._segments)

    def last_seq(self):
        """The newest seq of this boot, or None."""
        return self._next - 1 if self._next else None

    def free_bytes(self):
        """What may still be spilled, in bytes."""
        return max(0, self._max_bytes - self._used())

    # How it lies on flash.

    def _open(self):
        """Find what earlier boots left behind."""
        try:
            os.mkdir(self._folder)
        except OSError:
            pass  # it is there already; if it is not, the first spill says so
        try:
            names = os.listdir(self._folder)
        except OSError:
            names = []
        for name in names:
            if name.endswith(".new"):
                self._remove(self._folder + "/" + name)  # a power cut in the middle of a write: the rows were in RAM
                continue
            numbers = name.split("-")
            if len(numbers) == 3 and all(number.isdigit() for number in numbers):
                boot, first, last = [int(number) for number in numbers]
                self._segments.append([boot, first, last, SEGMENT_BYTES])
        self._segments.sort()
        try:
            with open(self._folder + "/notes") as file:
                drops, anchors = json.loads(_unseal(file.read()))
            self._drops = {int(boot): drops[boot] for boot in drops}
            self._anchors = {int(boot): anchors[boot] for boot in anchors}
        except (OSError, ValueError, TypeError):
            pass

    def _write_notes(self):
        drops = {str(boot): self._drops[boot] for boot in self._drops}
        anchors = {str(boot): self._anchors[boot] for boot in self._anchors}
        try:
            write_whole(self._folder + "/notes", _seal(json.dumps([drops, anchors])))
        except OSError:
            self.flash_faults += 1

    def _rows_after(self, boot, after, limit):
        """(rows without a hole between them, their manifest)."""
        rows, manifest = [], self.manifest_hash
        for segment in list(self._segments):  # one whose rows are all damaged is taken out on the way
            if segment[0] != boot or segment[2] <= after or len(rows) >= limit:
                continue
            found, found_manifest = self._load(segment)
            if rows and found_manifest != manifest:
                return rows, manifest
            manifest = found_manifest
            for row in found:
                if row[0] > after and len(rows) < limit:
                    if rows and row[0] != rows[-1][0] + 1:
                        return rows, manifest
                    rows.append(row)
        if boot == self.boot and (not rows or manifest == self.manifest_hash):
            if not rows:
                manifest = self.manifest_hash
            for row in self._ram:
                if row[0] > after and len(rows) < limit:
                    if rows and row[0] != rows[-1][0] + 1:
                        break
                    rows.append(row)
        return rows, manifest

    def _load(self, segment):
        """(rows, manifest) of a segment. A row whose checksum is wrong is not accepted: it counts as dropped."""
        path = self._path(segment[0], segment[1], segment[2])
        if self._loaded is not None and self._loaded[0] == path:
            return self._loaded[1], self._loaded[2]
        rows, manifest = [], self.manifest_hash
        try:
            with open(path) as file:
                for number, line in enumerate(file):
                    try:
                        content = json.loads(_unseal(line))
                        if number == 0:
                            manifest = content[0]
                        elif segment[1] <= content[0] <= segment[2]:
                            rows.append((content[0], content[1], content[2]))
                    except (ValueError, TypeError, IndexError):
                        self.flash_faults += 1
        except (OSError, UnicodeError):
            self.flash_faults += 1
        self._declare_missing(segment, rows)
        self._loaded = (path, rows, manifest)
        return rows, manifest

    def _declare_missing(self, segment, rows):
        there = [row[0] for row in rows]
        missing = [seq for seq in range(segment[1], segment[2] + 1) if seq not in there]
        for seq in missing:
            self._drop(segment[0], seq, seq, write=False)
        if missing:
            self._write_notes()
            if not rows:
                self._segments.remove(segment)

    def _make_room(self, size):
        """Drop the oldest segments until `size` bytes fit. False where they never will."""
        while self._segments and self._used() + size > self._max_bytes:
            boot, first, last, _ = self._segments.pop(0)
            self._drop(boot, first, last)  # noted before it is gone: a power cut may tell it twice, never not at all
            self._remove(self._path(boot, first, last))
        return self._used() + size <= self._max_bytes

    def _drop(self, boot, first, last, write=True):
        """Put down rows that are given up; ranges that touch become one."""
        drops = self._drops.setdefault(boot, [])
        if drops and first <= drops[-1][1] + 1 and last >= drops[-1][0]:
            drops[-1] = [min(first, drops[-1][0]), max(last, drops[-1][1])]
        else:
            drops.append([first, last])
            drops.sort()
        if write:
            self._write_notes()

    def _oldest_boot(self):
        boots = [segment[0] for segment in self._segments] + list(self._drops)
        if self._ram:
            boots.append(self.boot)
        return min(boots) if boots else None

    def _has_rows(self, boot):
        return (boot == self.boot and bool(self._ram)) or any(segment[0] == boot for segment in self._segments)

    def _held(self, boot):
        firsts = [segment[1] for segment in self._segments if segment[0] == boot]
        if boot == self.boot and self._ram:
            firsts.append(self._ram[0][0])
        return min(firsts) if firsts else None

    def _used(self):
        return sum(segment[3] for segment in self._segments)

    def _path(self, boot, first, last):
        return "%s/%d-%d-%d" % (self._folder, boot, first, last)

    def _keep_manifest(self):
        path = self._folder + "/manifest-" + self.manifest_hash
        try:
            os.stat(path)
        except OSError:
            write_whole(path, self._manifest.decode())

    def _forget_manifests(self):
        """No segment is left, so no stored row names a manifest."""
        if self._segments or not self._loaded:
            return
        self._loaded = None
        try:
            for name in os.listdir(self._folder):
                if name.startswith("manifest-"):
                    self._remove(self._folder + "/" + name)
        except OSError:
            pass

    def _remove(self, path):
        try:
            os.remove(path)
        except OSError:
            self.flash_faults += 1


def _seal(text):
    """A line with its CRC-32."""
    return "%s %08x\n" % (text, binascii.crc32(text.encode()) & 0xFFFFFFFF)


def _unseal(line):
    """The text of a sealed line. Raises ValueError where a bit of it has changed."""
    text = line[:-10]
    if line[-10:] != " %08x\n" % (binascii.crc32(text.encode()) & 0xFFFFFFFF):
        raise ValueError("checksum")
    return text
