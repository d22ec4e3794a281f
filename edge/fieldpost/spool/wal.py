"""SQLite's write-ahead log, frame by frame: SQLite ends it at the first frame that is not whole, and drops the rest.

After a power cut that is right, for the last transaction may be torn. A bit that flipped on the card looks the same
to it, and would cost every commit behind. So the log is looked at before SQLite sees it: a flipped bit is found by the
checksum and put right; a frame that is damaged for good is taken out where later frames show that it had been whole.
The layout is that of https://sqlite.org/fileformat2.html, section 4.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial

MAGIC = 0x377F0682
"""With its lowest bit set the words of the checksums are big-endian."""

VERSION = 3_007_000
HEADER_BYTES, FRAME_BYTES = 32, 24
WORD = 1 << 32

Sum = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Mended:
    """`content`: the log to put in its place, the same where nothing was wrong. `bits` were put right, `lost` frames
    were taken out: their pages are as they were before, so the tables need not fit together. `is_headless`: the header
    had to be made up; SQLite takes nothing of such a log."""

    content: bytes
    bits: int = 0
    lost: int = 0
    is_headless: bool = False


@dataclass(slots=True)
class _Frame:
    page: int
    commit: int
    salts: bytes
    stored: Sum
    body: bytes

    @classmethod
    def at(cls, content: bytes, start: int, page_bytes: int) -> _Frame:
        page, commit, salts, one, two = struct.unpack_from(">II8sII", content, start)
        return cls(page, commit, salts, (one, two), content[start + FRAME_BYTES : start + FRAME_BYTES + page_bytes])

    @property
    def summed(self) -> bytes:
        """What its checksum is made over."""
        return struct.pack(">II", self.page, self.commit) + self.body


def mend(content: bytes, page_bytes: int, before: Callable[[int], bytes] = lambda number: b"") -> Mended:
    """What was committed to this log, in a form that SQLite takes whole. `before`: a page as the main file has it."""
    header, bits, is_made_up = _header(content, page_bytes)
    if header is None:
        return Mended(content)
    order = ">" if header[3] & 1 else "<"
    salts = header[16:24]
    starts = range(HEADER_BYTES, len(content) - FRAME_BYTES - page_bytes + 1, FRAME_BYTES + page_bytes)
    frames = [_Frame.at(content, start, page_bytes) for start in starts]
    while frames and not _alike(frames[-1].salts, salts):
        frames.pop()  # of an earlier round of the log
    seed: Sum | None = None if is_made_up else _stored(header)
    kept: list[_Frame] = []
    lost = 1 if is_made_up and frames else 0
    for number, frame in enumerate(frames):
        if not _alike(frame.salts, salts) and not _has_later_commit(frames, number, salts):
            break
        following = frames[number + 1] if number + 1 < len(frames) else None
        wrong = _flips(frame, seed, salts, order, following, partial(_likeness, frames, number, before))
        if wrong is None and not _has_later_commit(frames, number, salts):
            break  # torn: nobody was told that it is safe
        if wrong is None:
            lost += 1
            seed = None
            continue
        bits += wrong
        frame.salts = salts
        kept.append(frame)
        seed = frame.stored
    if not bits and not lost:
        return Mended(content)
    return Mended(b"".join(_written(header, kept, order)), bits, lost, is_made_up)


def committed(content: bytes, page_bytes: int) -> tuple[dict[int, bytes], int]:
    """The pages that a log holds, as its last commit left them, and of how many the file consists then; 0: no commit.

    It must be whole, as `mend` makes it.
    """
    pages: dict[int, bytes] = {}
    open_: dict[int, bytes] = {}
    size = 0
    for start in range(HEADER_BYTES, len(content) - FRAME_BYTES - page_bytes + 1, FRAME_BYTES + page_bytes):
        frame = _Frame.at(content, start, page_bytes)
        if frame.salts != content[16:24]:
            break
        open_[frame.page] = frame.body
        if frame.commit:
            pages |= open_
            open_, size = {}, frame.commit
    return pages, size


def checksum(words: bytes, order: str, seed: Sum = (0, 0)) -> Sum:
    """Section 4.2: two sums over pairs of words."""
    one, two = seed
    numbers = struct.unpack(f"{order}{len(words) // 4}I", words)
    for even, odd in zip(numbers[::2], numbers[1::2], strict=True):
        one = (one + even + two) & 0xFFFFFFFF
        two = (two + odd + one) & 0xFFFFFFFF
    return one, two


def _header(content: bytes, page_bytes: int) -> tuple[bytes | None, int, bool]:
    """The log's header, how many bits of it were put right, and whether it had to be made up from its first frame."""
    header = content[:HEADER_BYTES]
    if len(content) <= HEADER_BYTES + FRAME_BYTES:
        return None, 0, False
    if _is_header(header, page_bytes):
        return header, 0, False
    salts = content[HEADER_BYTES + 8 : HEADER_BYTES + 16]
    others = [other for bit in range(HEADER_BYTES * 8) if _is_header(other := _turned(header, bit), page_bytes)]
    if others:
        # A bit of the last word and one of the second sum are alike; the first frame knows the word.
        return min(others, key=lambda other: other[16:24] != salts), 1, False
    if not any(salts):
        return None, 0, False
    start = struct.pack(">IIII", MAGIC, VERSION, page_bytes, 0) + salts
    return start + struct.pack(">II", *checksum(start, "<")), 0, True


def _is_header(header: bytes, page_bytes: int) -> bool:
    magic, version, size = struct.unpack_from(">III", header)
    if magic & ~1 != MAGIC or version != VERSION or size != page_bytes:
        return False
    return checksum(header[:24], ">" if magic & 1 else "<") == _stored(header)


def _stored(header: bytes) -> Sum:
    one, two = struct.unpack_from(">II", header, 24)
    return one, two


def _flips(
    frame: _Frame,
    seed: Sum | None,
    salts: bytes,
    order: str,
    following: _Frame | None,
    likeness: Callable[[int, int], tuple[float, ...]],
) -> int | None:
    """How many bits of a frame had to be put right: 0 or 1. None: it is damaged beyond that.

    `likeness(page, commit)`: how well these numbers would stand here, for where several bits come into question.
    Without a seed (the frame before is lost) the frame is taken as it is: the rows have checksums of their own.
    A flipped bit of the second sum looks like one of the last word; the frame behind knows, and where there is none
    the page is left as it is.
    """
    if not _alike(frame.salts, salts):
        return None
    bits = int(frame.salts != salts)
    if seed is None:
        return bits
    made = checksum(frame.summed, order, seed)
    if made == frame.stored:
        return bits
    if bits:
        return None
    missing = ((frame.stored[0] - made[0]) % WORD, (frame.stored[1] - made[1]) % WORD)
    places = _places(len(frame.summed) // 8, order).get(missing, ())
    pages = [page for place in places if checksum(page := _turned(frame.summed, place), order, seed) == frame.stored]
    is_sum = sum((a ^ b).bit_count() for a, b in zip(made, frame.stored, strict=True)) == 1
    if is_sum and (not pages or (following and checksum(following.summed, order, made) == following.stored)):
        frame.stored = made
        return 1
    if not pages:
        return None
    if len(pages) == 1 and not (is_sum and following is None):
        frame.page, frame.commit = struct.unpack_from(">II", pages[0])
        frame.body = pages[0][8:]
    else:
        numbers = [(frame.page, frame.commit), *(struct.unpack_from(">II", page) for page in pages)]
        frame.page, frame.commit = max(numbers, key=lambda two: likeness(*two))
    return 1


def _likeness(
    frames: Sequence[_Frame], number: int, before: Callable[[int], bytes], page: int, commit: int
) -> tuple[float, ...]:
    """A transaction's pages ascend, its last frame has the file's size, and a page is like what it was."""
    here, behind = frames[number], frames[number + 1 :]
    ahead = [frame for frame in frames[:number] if frame.salts == here.salts]
    begins = not ahead or ahead[-1].commit > 0
    ends = not behind or not _alike(behind[0].salts, here.salts) or behind[0].page <= here.page
    sizes = [frame.commit for frame in frames if frame.commit and frame is not here]
    size = max(sizes, key=lambda other: -abs(other - commit), default=commit)
    was = next((frame.body for frame in reversed(ahead) if frame.page == page), None) or before(page)
    return (
        begins or ahead[-1].page < page,
        commit > 0 or not behind or behind[0].page > page,
        page <= (commit or max(sizes, default=page)),
        (commit > 0) == ends,
        -abs(size - commit) if commit else 0,
        sum(a == b for a, b in zip(was, here.body, strict=True)) / len(was) if was else 0.5,
    )


@cache
def _places(pairs: int, order: str) -> dict[Sum, list[int]]:
    """Which bits may make which difference in a checksum over so many pairs of words, whatever the words are.

    It is weak for the highest bits of a word: there several come into question, and the page stays as it is.
    """
    found: dict[Sum, list[int]] = {}
    even, odd = (1, 1), (0, 1)  # what 1 more in a word of the last pair does to the two sums
    for pair in reversed(range(pairs)):
        for word, weight in ((2 * pair, even), (2 * pair + 1, odd)):
            for bit in range(32):
                byte = bit // 8 if order == "<" else 3 - bit // 8
                at = (word * 4 + byte) * 8 + bit % 8
                for sign in {1, -1} if bit < 31 else {1}:
                    made = ((sign * weight[0] << bit) % WORD, (sign * weight[1] << bit) % WORD)
                    found.setdefault(made, []).append(at)
        even, odd = _after_a_pair(even), _after_a_pair(odd)
    return found


def _after_a_pair(sums: Sum) -> Sum:
    one = (sums[0] + sums[1]) % WORD
    return one, (sums[1] + one) % WORD


def _has_later_commit(frames: Sequence[_Frame], number: int, salts: bytes) -> bool:
    """Whether a transaction began after the one that a frame belongs to: then that one had been made durable."""
    for at in range(number, len(frames) - 1):
        if frames[at].commit and _alike(frames[at].salts, salts) and _alike(frames[at + 1].salts, salts):
            return True
    return False


def _alike(one: bytes, other: bytes) -> bool:
    """The same but for one bit."""
    return (int.from_bytes(one) ^ int.from_bytes(other)).bit_count() <= 1


def _turned(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def _written(header: bytes, frames: Sequence[_Frame], order: str) -> Iterator[bytes]:
    """The log anew, each checksum built on the one before."""
    yield header
    seed = _stored(header)
    for frame in frames:
        seed = checksum(frame.summed, order, seed)
        yield struct.pack(">II8sII", frame.page, frame.commit, frame.salts, *seed) + frame.body
