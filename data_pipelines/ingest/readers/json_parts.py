"""JSON lists and JSON Lines of any size, cut into parts that workers read on their own.

A list's entries are separated by the commas one level deep. One pass over the bytes finds them, so that each part is a range of
bytes that `json` parses alone; a streaming parser such as ijson knows no byte offsets, and would read a list from its start for
every part.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from data_pipelines.ingest import storage
from data_pipelines.ingest.errors import FILE_DAMAGED, IngestError, Skip, unreadable

LINES = (".jsonl", ".ndjson")
"""Files with these endings hold an entry a line, all others one list."""

PART_BYTES = 32 * 2**20
"""A part ends with the entry that reaches so many bytes, also before it has all its entries."""

ENTRY_BYTES = 64 * 2**20
"""A longer entry is none; without a limit it could take all memory."""

_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_AT_DEPTH_1 = re.compile(rb'(?:[^"\[\]{},]++|' + _STRING + rb")*+(.?)", re.DOTALL)
_DEEPER = re.compile(rb'(?:[^"\[\]{}]++|' + _STRING + rb")*+(.?)", re.DOTALL)
_STEPS = {b"[": 1, b"{": 1, b"]": -1, b"}": -1}
_SPACE = b" \t\r\n"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclasses.dataclass(frozen=True)
class Part:
    """The bytes [start, end) of a file, which hold whole entries; the first of them is entry `first` of the file (line, in lines)."""

    first: int
    start: int
    end: int

    def __str__(self) -> str:
        return f"{self.first}:{self.start}-{self.end}"

    @classmethod
    def parse(cls, text: str) -> Part:
        """The part that `str` wrote."""
        return cls(*map(int, re.split("[:-]", text)))


def split(path: str, entries: int) -> list[Part]:
    """The parts of a file, of so many entries each or of `PART_BYTES`.

    Raises:
        IngestError: a list that breaks off or that something follows, a file that is no list and not named as lines, or an
            entry over `ENTRY_BYTES`.
    """
    ends = _line_ends(storage.blocks(path)) if path.endswith(LINES) else _entry_ends(path, storage.blocks(path))
    parts: list[Part] = []
    count, first = 0, 0
    start = last = next(ends)
    for end in ends:
        if end - last > ENTRY_BYTES:
            raise IngestError(f"{path}: entry {count} at byte {last} has over {ENTRY_BYTES} bytes; it is no sample")
        count, last = count + 1, end
        if count - first == entries or end - start >= PART_BYTES:
            parts.append(Part(first, start, end))
            first, start = count, end
    return parts + [Part(first, start, last)] * (last > start)


def read(path: str, part: Part) -> Iterator[tuple[int, Any]]:
    """(number, entry) of a part; a `Skip` in the place of an entry that is not JSON."""
    (data,) = storage.read_ranges(path, [(part.start, part.end)])
    if path.endswith(LINES):
        for number, line in enumerate(data.split(b"\n"), part.first):
            if line.strip():
                yield number, _parsed(line, "not_json", f"{path}:{number}")
        return
    entries = _parsed(b"[" + data.rstrip(_SPACE + b",") + b"]", FILE_DAMAGED, f"{path}, bytes {part.start}-{part.end}")
    yield from [(part.first, entries)] if isinstance(entries, Skip) else enumerate(entries, part.first)


def _parsed(data: bytes, reason: str, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        return unreadable(reason, f"{where}: {error}")


def _line_ends(blocks: Iterable[bytes]) -> Iterator[int]:
    """0, then the offset after every line."""
    yield 0
    offset = last = 0
    for block in blocks:
        for match in re.finditer(rb"\n", block):
            last = offset + match.end()
            yield last
        offset += len(block)
    if offset > last:
        yield offset


def _entry_ends(path: str, blocks: Iterable[bytes]) -> Iterator[int]:
    """The offset after a list's opening bracket, then after each entry's comma, and that of the closing bracket."""
    blocks = iter(blocks)
    data = next(blocks, b"")
    position = _opening(path, data)
    yield position
    depth, offset = 1, 0
    while True:
        while position < len(data):
            match = (_AT_DEPTH_1 if depth == 1 else _DEEPER).match(data, position)
            if match[1] == b'"':  # a text that goes on in the next block
                position = match.end() - 1
                break
            position, depth = match.end(), depth + _STEPS.get(match[1], 0)
            if depth == 0:
                _check_end(path, offset + position, match[1], itertools.chain([data[position:]], blocks))
                yield offset + position - 1
                return
            if match[1] == b",":
                yield offset + position
        block = next(blocks, None)
        if block is None or len(data) - position > ENTRY_BYTES:
            fault = "breaks off" if block is None else f"has a text of over {ENTRY_BYTES} bytes"
            raise IngestError(f"{path} {fault} at byte {offset + position}; fetch it again")
        data, position, offset = data[position:] + block, 0, offset + position


def _check_end(path: str, offset: int, bracket: bytes, rest: Iterable[bytes]) -> None:
    """Checks that a list ends with its own bracket and the file with the list: a second one would be lost in silence."""
    if bracket != b"]":
        raise IngestError(f"{path}: the list ends with {bracket.decode()!r} before byte {offset}; fetch it again")
    if any(block.strip(_SPACE) for block in rest):
        raise IngestError(
            f"{path} goes on after its list, which ends before byte {offset}; put each list into a file of its own, or fetch it again"
        )


def _opening(path: str, data: bytes) -> int:
    """The offset after the bracket that opens a list."""
    text = data.removeprefix(_BYTE_ORDER_MARK).lstrip(_SPACE)
    if not text.startswith(b"["):
        raise IngestError(f"{path} is not a JSON list; names of JSON Lines end in {' or '.join(LINES)}")
    return len(data) - len(text) + 1
