"""What a compiled TPU program moves, read from its HLO text: collectives by kind, bytes over HBM, each times its loops' trips.

The text, as the compiler writes it down after its last pass, is scheduled and has buffers assigned: a shape with S(n) in its layout lies in on-chip memory, all
others in HBM. The compiler spreads an asynchronous collective over several fusions that carry one channel id, also into loops that
only hide it; it is counted once, where it starts.
Between slices it moves data by pairs of `send` and `recv` through the hosts, marked `_xla_megascale_transfer_type`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from hypervl_jax.architecture import ConfigError, require

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_SCATTERED = "all-reduce-scattered"

_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\(([^)]*)\)?(.*)")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"(pred|bf16|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(
    r"\b(calls|body|condition|to_apply|true_computation|false_computation|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)


class Buffer(NamedTuple):
    """One array of a shape: its bytes without padding, and whether it lies in HBM."""

    size: int
    in_hbm: bool


class Instruction(NamedTuple):
    """One line of HLO. `called` maps the attribute (calls, body, condition, …) to computations."""

    name: str
    opcode: str
    buffers: tuple[Buffer, ...]
    operands: tuple[str, ...]
    called: Mapping[str, tuple[str, ...]]
    text: str
    is_root: bool


Computation = dict[str, Instruction]


class Program(NamedTuple):
    """Computations by name, each a dictionary of its instructions in order."""

    computations: dict[str, Computation]
    entry: str


class Collective(NamedTuple):
    """A collective operation, `times` times a step.

    `size`: bytes, on one device, of the whole array that is gathered, scattered, reduced, exchanged or sent. `group`: devices that take
    part; of a collective between slices, slices. `crosses`: whether it leaves the slice.
    """

    kind: str
    size: int
    group: int
    times: int
    crosses: bool

    @property
    def received(self) -> float:
        """Bytes that a device must at least receive in a step, whatever the algorithm."""
        share = {"collective-permute": 1.0, "all-reduce": 2 * (self.group - 1) / self.group}
        return self.times * self.size * share.get(self.kind, (self.group - 1) / self.group)


def parse_program(text: str) -> Program:
    """The program of a compiled module's text."""
    computations, entry, current = {}, "", {}
    for line in text.splitlines():
        if not line.startswith(" "):
            opened = _COMPUTATION.match(line)
            if opened:
                current = computations.setdefault(opened[1], {})
                entry = opened[1] if line.startswith("ENTRY") else entry
            continue
        found = _parse_line(line)
        if found:
            current[found.name] = found
    require(bool(entry), "this is no HLO text: it has no ENTRY computation")
    return Program(computations, entry)


def _parse_line(line: str) -> Instruction | None:
    match = _LINE.match(line)
    if not match:
        return None
    root, name, shape, opcode, operands, rest = match.groups()
    called = {key: tuple(re.findall(r"[\w.\-]+", names)) for key, names in _CALLED.findall(rest)}
    return Instruction(
        name, opcode, _buffers(shape), tuple(re.findall(r"%([\w.\-]+)", operands)), called, line, bool(root)
    )


def _buffers(shape: str) -> tuple[Buffer, ...]:
    return tuple(
        Buffer(math.prod(map(int, filter(None, extents.split(",")))) * _bits(kind) // 8, "S(" not in layout)
        for kind, extents, layout in _ARRAY.findall(shape)
    )


def _bits(kind: str) -> int:
    digits = re.search(r"\d+", kind)
    return int(digits[0]) if digits else 8


def executions(program: Program, arm: int) -> Iterator[tuple[Computation, int]]:
    """Every computation that runs by itself (not inside a fusion), with how often it runs a step.

    `arm` is the branch that a conditional outside of any loop takes; inside loops the longest branch is taken.
    """
    return _executions(program, program.entry, 1, arm)


def _executions(program: Program, name: str, times: int, arm: int | None) -> Iterator[tuple[Computation, int]]:
    computation = program.computations[name]
    yield computation, times
    for instruction in computation.values():
        if instruction.opcode == "while":
            trips = trip_count(program, instruction)
            yield from _executions(program, instruction.called["body"][0], times * trips, None)
        elif instruction.opcode == "conditional":
            yield from _executions(program, _branch(program, instruction, arm), times, None)
        elif instruction.opcode in ("call", "async-start"):
            for called in (name for names in instruction.called.values() for name in names):
                yield from _executions(program, called, times, arm)


def _branch(program: Program, instruction: Instruction, arm: int | None) -> str:
    called = instruction.called
    branches = called.get("branch_computations") or called["false_computation"] + called["true_computation"]
    if arm is not None and arm < len(branches):
        return branches[arm]
    return max(branches, key=lambda name: len(program.computations[name]))


def trip_count(program: Program, loop: Instruction) -> int:
    """How often a `while` runs: what the compiler wrote down, else the bound in its condition over the step of its counter.

    Our scans count from 0 by 1; the compiler's own loops (a matrix product that hides its collective) count from 0 by 1 or 2.
    Raises `ConfigError` when neither is there.
    """
    known = re.search(r'known_trip_count[":{ ]+n"?[": ]+(\d+)', loop.text)
    if known:
        return int(known[1])
    condition = program.computations[loop.called["condition"][0]]
    bounds = [found for line in condition.values() for found in _bounds(program, condition, line)]
    if len(bounds) != 1:
        raise ConfigError(
            f"the number of trips of {loop.name} is not written in its condition: {len(bounds)} candidates"
        )
    counter, bound = bounds[0]
    return -(-bound // _step(program, loop, counter))


def _bounds(program: Program, condition: Computation, line: Instruction) -> list[tuple[int, int]]:
    """(place in the loop's tuple, constant that it is compared with) of a comparison, also of one inside a fusion."""
    compares = line.opcode == "compare" or (
        line.opcode == "fusion"
        and any(
            inner.opcode == "compare" for name in line.called["calls"] for inner in program.computations[name].values()
        )
    )
    operands = [condition[name] for name in line.operands] if compares else []
    constants = [found for operand in operands if (found := _constant(operand)) is not None]
    return [(place, bound) for operand in operands if (place := _place(operand)) is not None for bound in constants]


def _constant(line: Instruction) -> int | None:
    found = re.search(r"constant\((-?\d+)\)", line.text) if line.opcode == "constant" else None
    return int(found[1]) if found else None


def _place(line: Instruction) -> int | None:
    found = re.search(r"index=(\d+)", line.text) if line.opcode == "get-tuple-element" else None
    return int(found[1]) if found else None


def _step(program: Program, loop: Instruction, counter: int) -> int:
    """What one trip adds to the counter."""
    body = program.computations[loop.called["body"][0]]
    following = body[_root(body).operands[counter]]
    steps = [found for name in following.operands if (found := _constant(body[name])) is not None]
    if following.opcode != "add" or len(steps) != 1 or steps[0] < 1:
        raise ConfigError(f"the number of trips of {loop.name} is unknown: its body does not say how it counts")
    return steps[0]


# -------------------------------------------------------------------- collectives


def collectives(program: Program, arm: int = 0, slices: int = 1) -> list[Collective]:
    """Every collective of a step in order; `arm` as in `executions`, `slices` of the topology."""
    return [
        _collective(kind, instruction, times, slices)
        for computation, times in executions(program, arm)
        for line in computation.values()
        for kind, instruction in _communications(program, line)
    ]


def _communications(program: Program, line: Instruction) -> Iterator[tuple[str, Instruction]]:
    """(kind, instruction) of the collectives that a line starts, inside a fusion too."""
    kind = line.opcode.removesuffix("-start")
    if kind in KINDS or (kind == "recv" and "_xla_megascale_transfer_type" in line.text):
        yield kind, line
    elif kind == "fusion" and not _continues(program, line):
        name = line.called["calls"][0]
        for inner in program.computations[name].values():
            # The compiler's name for a reduce-scatter that it writes as an all-reduce whose result is sliced.
            scattered = name.startswith("all-reduce-scatter") and inner.opcode == "all-reduce"
            found = _communications(program, inner)
            yield from ((_SCATTERED if scattered else kind, instruction) for kind, instruction in found)


def _continues(program: Program, fusion: Instruction) -> bool:
    """Whether a fusion only carries on or ends a collective that another one has started."""
    name = fusion.called["calls"][0]
    inside = program.computations[name].values()
    collective = any(line.opcode in KINDS for line in inside)
    return collective and not name.startswith("all-reduce-scatter") and not any(map(_starts, inside))


def _starts(line: Instruction) -> bool:
    return line.opcode == "custom-call" and '"AsyncCollectiveStart"' in line.text


def _collective(kind: str, instruction: Instruction, times: int, slices: int) -> Collective:
    sizes = [buffer.size for buffer in instruction.buffers]
    if kind == "recv":
        named = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.text)[1]
        return Collective(named.lower().replace("_", "-"), sizes[0], slices, times, True)
    group = 1 if kind == "collective-permute" else group_size(instruction.text)
    if kind == "collective-permute" and instruction.opcode.endswith("-start"):
        return Collective(kind, sizes[0], group, times, False)
    size = sum(sizes) // 2 if instruction.opcode == "all-reduce-start" and len(sizes) > 1 else sum(sizes)
    if instruction.opcode == "all-gather-start":
        size = max(sizes)
    if kind == "reduce-scatter":
        size *= group
    return Collective("reduce-scatter" if kind == _SCATTERED else kind, size, group, times, False)


def group_size(text: str) -> int:
    """Devices of one replica group, in any of the three forms in which HLO writes groups."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    if listed:
        return len(listed[1].split(","))
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]<=", text)
    if iota:
        return int(iota[1])
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\].*? \{([^}]*)\}", text)
    require(mesh is not None, f"cannot read the replica groups of {text.strip()[:120]}")
    sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
    axes = re.findall(r"'([^':]+)'?(?::\(\d+\)(\d+))?", mesh[2])
    return math.prod(int(part) if part else sizes[axis] for axis, part in axes)


# -------------------------------------------------------------------- memory traffic

_MOVES_NOTHING = frozenset(
    [
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "while",
        "conditional",
        "call",
        "after-all",
        "partition-id",
        "async-start",
        "async-update",
    ]
)
"""What an asynchronous instruction moves is in the computation that it calls."""

_SLICES = ("dynamic-slice", "slice", "gather")


def hbm_bytes(program: Program, arm: int = 0) -> int:
    """Bytes that a step reads from HBM and writes to it when every fusion reads its operands once; `arm` as in `executions`.

    Of an operand that is only sliced the slice counts, of one that is updated in place the update.
    """
    return sum(
        times * _traffic(program, computation, instruction)
        for computation, times in executions(program, arm)
        for instruction in computation.values()
        if instruction.opcode not in _MOVES_NOTHING and not instruction.opcode.endswith("-done")
    )


def _traffic(program: Program, computation: Computation, line: Instruction) -> int:
    reads = [computation[name].buffers for name in line.operands if name in computation]
    if line.opcode == "custom-call" and '"AllocateBuffer"' in line.text:
        return 0
    if line.opcode == "fusion":
        return _fusion_traffic(program, line, reads)
    written = _written(line)
    if line.opcode == "dynamic-update-slice":
        return 2 * reads[1][0].size if _in_hbm(written) else 0
    if line.opcode.removesuffix("-start") in _SLICES:
        return _in_hbm(written) + (written[0].size if _in_hbm(reads[0]) else 0)
    return _in_hbm(written) + sum(map(_in_hbm, reads))


def _written(line: Instruction) -> tuple[Buffer, ...]:
    """Results of an instruction; the start of an asynchronous one lists its operands first, but that of a copy its result."""
    if line.opcode == "copy-start":
        return line.buffers[:1]
    return line.buffers[len(line.operands) :][:1] if line.opcode.endswith("-start") else line.buffers


def _in_hbm(buffers: Iterable[Buffer]) -> int:
    return sum(buffer.size for buffer in buffers if buffer.in_hbm)


def _fusion_traffic(program: Program, fusion: Instruction, reads: list[tuple[Buffer, ...]]) -> int:
    fused = program.computations[fusion.called["calls"][0]]
    idle = _continues(program, fusion)
    total = 0
    for number, buffers in enumerate(reads):
        if _in_hbm(buffers):
            total += min(_in_hbm(buffers), _used_bytes(program, fused, _parameter(fused, number), idle))
    root = _root(fused)
    parts = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(parts) != len(fusion.buffers):
        return total + _in_hbm(fusion.buffers)
    changed = zip(fusion.buffers, parts, strict=True)
    return total + sum(min(out.size, _changed_bytes(program, fused, part, idle)) for out, part in changed if out.in_hbm)


def _parameter(fused: Computation, number: int) -> Instruction:
    return next(line for line in fused.values() if line.opcode == "parameter" and f"parameter({number})" in line.text)


def _root(fused: Computation) -> Instruction:
    return next(line for line in fused.values() if line.is_root)


def _used_bytes(program: Program, fused: Computation, value: Instruction, idle: bool) -> int:
    """Bytes of a value that the instructions of a fusion read; `idle`: its collective is counted elsewhere."""
    users = (user for user in fused.values() if value.name in user.operands)
    return sum(_read_by(program, user, value, fused, idle) for user in users)


def _read_by(program: Program, user: Instruction, value: Instruction, fused: Computation, idle: bool) -> int:
    place = user.operands.index(value.name)
    if user.opcode in _SLICES and place == 0:
        return user.buffers[0].size
    if user.opcode == "tuple" or (user.opcode == "dynamic-update-slice" and place == 0):
        return 0
    if idle and (user.opcode in KINDS or user.opcode == "custom-call"):
        return 0
    if user.opcode == "bitcast":
        return _used_bytes(program, fused, user, idle)
    if user.opcode == "fusion":
        inner = program.computations[user.called["calls"][0]]
        return _used_bytes(program, inner, _parameter(inner, place), idle)
    return value.buffers[0].size


def _changed_bytes(program: Program, fused: Computation, value: Instruction, idle: bool) -> int:
    """Bytes of a fusion's result that it writes: nothing of what it passes on, of an update in place only the update."""
    if value.opcode == "parameter" or (idle and (value.opcode in KINDS or value.opcode == "custom-call")):
        return 0
    if value.opcode == "bitcast":
        return _changed_bytes(program, fused, fused[value.operands[0]], idle)
    if value.opcode == "dynamic-update-slice":
        return fused[value.operands[1]].buffers[0].size
    if value.opcode == "fusion":
        inner = program.computations[value.called["calls"][0]]
        root = _root(inner)
        return (
            _changed_bytes(program, inner, root, idle) if root.opcode != "tuple" else sum(b.size for b in value.buffers)
        )
    return sum(buffer.size for buffer in value.buffers)
