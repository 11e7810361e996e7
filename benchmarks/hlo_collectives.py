"""What the collectives of a compiled program move, read from the text of its optimized HLO. Not a program; no JAX.

Bytes are counted per device and per run of the program, in two ways:

- *payload*: the buffer that a collective is about: an all-reduce's or reduce-scatter's operand, the result of the
  others. A tuple's parts add up.
- *sent*: what a ring of the n devices of a group has each of them send: 2 (n - 1) / n of an all-reduce's payload,
  (n - 1) / n of an all-gather's, a reduce-scatter's and an all-to-all's, all of a collective-permute's.

A collective in the body of a loop counts once per trip; both branches of a condition count. Groups of one device move
nothing and are left out. Collectives that start and end apart (``all-reduce-start``, GPUs) are refused, not guessed at.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_NUM_PARTITIONS = re.compile(r"^HloModule .*\bnum_partitions=(\d+)")


@dataclass(frozen=True)
class Collective:
    """One instruction: ``payload`` in bytes per run of it, ``group`` the devices that take part, ``runs`` of it."""

    kind: str
    payload: int
    group: int
    runs: int = 1

    @property
    def sent(self) -> float:
        """Bytes that each device of a ring sends per run of the instruction."""
        share = 1.0 if self.kind == "collective-permute" else (self.group - 1) / self.group
        return self.payload * share * (2 if self.kind == "all-reduce" else 1)


@dataclass(frozen=True)
class Total:
    """Several collectives in a run of the program."""

    count: int = 0
    payload: float = 0
    sent: float = 0

    def __add__(self, other: "Total") -> "Total":
        return Total(self.count + other.count, self.payload + other.payload, self.sent + other.sent)


def totals(hlo: str) -> dict[str, Total]:
    """Per kind, what one run of the program moves; only kinds that it has."""
    found: dict[str, Total] = defaultdict(Total)
    for one in collectives(hlo):
        found[one.kind] += Total(one.runs, one.runs * one.payload, one.runs * one.sent)
    return dict(found)


def collectives(hlo: str) -> list[Collective]:
    """Every collective that the program reaches from its entry, with how often it runs."""
    computations, entry = _computations(hlo)
    partitions = _NUM_PARTITIONS.search(hlo)
    return list(_walk(computations, entry, 1, int(partitions[1]) if partitions else 1))


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the entry."""
    computations: dict[str, list[str]] = {}
    entry, name = "", ""
    for line in hlo.splitlines():
        if start := _COMPUTATION.match(line):
            name = start[2]
            computations[name] = []
            entry = name if start[1] else entry
        elif name and line.startswith(" "):
            computations[name].append(line)
    if not entry:
        raise ValueError("no ENTRY computation: is this the text of an HLO module?")
    return computations, entry


def _walk(computations: dict[str, list[str]], name: str, runs: int, partitions: int) -> Iterator[Collective]:
    for line in computations[name]:
        instruction = _INSTRUCTION.match(line)
        if instruction is None:
            continue
        result, opcode = instruction.groups()
        if opcode.removesuffix("-start") in COLLECTIVES:
            if opcode.endswith("-start"):
                raise ValueError(f"{opcode} is not counted, only {', '.join(COLLECTIVES)}")
            group = group_size(line, partitions)
            scattered = group if opcode == "reduce-scatter" else 1
            if group > 1:
                yield Collective(opcode, num_bytes(result) * scattered, group, runs)
            continue
        trips = int(found[1]) if opcode == "while" and (found := _TRIPS.search(line)) else 1
        branches = _BRANCHES.search(line)
        called = _CALLED.findall(line) + (re.findall(r"[\w.\-]+", branches[1]) if branches else [])
        for other in called:
            yield from _walk(computations, other, runs * trips, partitions)


def num_bytes(shapes: str) -> int:
    """Bytes of a shape as HLO writes it, or of all parts of a tuple.

    Example: ``(f32[8,128]{1,0}, bf16[4])`` has 4104.
    """
    total = 0
    for dtype, dimensions in _SHAPE.findall(shapes):
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0]) if re.search(r"\d", dtype) else 0
        total += math.prod(int(size) for size in dimensions.split(",") if size) * bits // 8
    return total


def group_size(line: str, partitions: int) -> int:
    """Devices that take part in one collective together, of the ``partitions`` that run the program.

    Examples: 4 of ``replica_groups={{0,1,2,3},{4,5,6,7}}``, of ``[2,4]<=[8]`` and of ``mesh['a'=2,'b'=4] {'b'}``, 2 of
    ``mesh['b'=8] {'b':(4)2}``, all of ``{}``.
    """
    if "source_target_pairs=" in line:
        return partitions
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[name]) for name, part in axes)
    if listed := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(listed[1])
    if written := re.search(r"replica_groups=\{(?:\{([\d,]*)\})?", line):
        return len(written[1].split(",")) if written[1] else partitions
    raise ValueError(f"replica_groups in a form that is not known: {line.strip()[:300]}")
