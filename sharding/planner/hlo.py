"""What a compiled program does, read from its text: collectives, floating-point operations, and suspicious arrays.

XLA counts the body of a loop once; here everything is multiplied by the trips of the loops that it stands in.
"""

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

COLLECTIVES = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)

_ITEM_BYTES = {
    "pred": 1.0,
    **dict.fromkeys(("s4", "u4"), 0.5),
    **dict.fromkeys(("s8", "u8"), 1.0),
    **dict.fromkeys(("s16", "u16", "bf16", "f16"), 2.0),
    **dict.fromkeys(("s32", "u32", "f32"), 4.0),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8.0),
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """All executions of the instructions of one kind over the same axes, for arrays of the same shape."""

    kind: str
    axes: tuple[str, ...]
    """Of the mesh, among whose devices it runs."""
    shape: str
    """The larger side on each device: what it has after a gather, or before a reduction or exchange."""
    count: int
    """Executions in one run of the program."""
    bytes: int
    """That one device receives, in all executions."""
    in_loop: bool
    windowed: bool = False
    """Whether the compiler does it in pieces, between the pieces of the product that it belongs to."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    arguments: str
    """Between the parentheses, as it is written."""
    attributes: str
    """Behind them."""
    root: bool


@dataclasses.dataclass(frozen=True)
class Program:
    computations: Mapping[str, Sequence[Instruction]]
    entry: str


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")


def parse(text: str) -> Program:
    """Reads `compiled.as_text()`."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if header := _COMPUTATION.match(line):
                current = computations[header[2]] = []
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif found := _INSTRUCTION.match(line):
            root, name, shape, opcode, rest = found.groups()
            end = _closing(rest)
            operands = tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
            current.append(Instruction(name, opcode, shape, operands, rest[:end], rest[end + 1 :], bool(root)))
    assert entry, "no entry computation"
    return Program(computations, entry)


def _closing(text: str) -> int:
    """Where the parenthesis closes that was open before the text."""
    depth = 1
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return at
    return len(text)


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """The element type and dims of each array in a shape, which may be a tuple."""
    return [
        (kind, tuple(int(size.removeprefix("<=")) for size in dims.split(",") if size))
        for kind, dims in _ARRAY.findall(shape)
        if kind in _ITEM_BYTES
    ]


def bytes_of(shape: str) -> int:
    """Of all arrays in a shape, without padding."""
    return sum(math.ceil(math.prod(dims) * _ITEM_BYTES[kind]) for kind, dims in arrays(shape))


@dataclasses.dataclass(frozen=True)
class Execution:
    """An instruction, where it stands, and how often it runs."""

    instruction: Instruction
    computation: str
    trips: int
    in_loop: bool
    fused: bool


def executions(program: Program) -> Iterator[Execution]:
    """Every instruction that the program runs, also inside fusions; of a conditional, those of every branch.

    What stands in a loop whose length depends on data runs 0 times (`loops_of_unknown_length`).
    """
    return _executions(program, program.entry, 1)


def _executions(
    program: Program, computation: str, trips: int, in_loop: bool = False, fused: bool = False
) -> Iterator[Execution]:
    for instruction in program.computations[computation]:
        yield Execution(instruction, computation, trips, in_loop, fused)
        if instruction.opcode == "while":
            count = trip_count(program, computation, instruction) or 0
            yield from _executions(program, _called(instruction, "body")[0], trips * count, True, fused)
        elif instruction.opcode in ("fusion", "call", "conditional", "async-start"):
            for name in _called(instruction, "calls|to_apply|branch_computations|true_computation|false_computation"):
                yield from _executions(program, name, trips, in_loop, fused or instruction.opcode == "fusion")


def _called(instruction: Instruction, attribute: str) -> list[str]:
    found = re.findall(rf"\b(?:{attribute})=(\{{[^}}]*\}}|%?[\w.\-]+)", instruction.attributes)
    return [name for names in found for name in re.findall(r"[\w.\-]+", names)]


def trip_count(program: Program, computation: str, loop: Instruction) -> int | None:
    """How often the body of a `while` in a computation runs; None if that depends on data."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    (condition,) = _called(loop, "condition")
    constants, indices = [], []
    for instruction in _flattened(program, condition):
        if instruction.opcode == "constant" and re.match(r"[su]\d+\[\]", instruction.shape):
            constants.append(int(instruction.arguments))
        if instruction.opcode == "get-tuple-element":
            indices.append(int(re.search(r"index=(\d+)", instruction.attributes)[1]))  # type: ignore[index]
        if instruction.opcode == "compare" and "direction=LT" not in instruction.attributes:
            return None
    if len(constants) != 1 or len(indices) != 1:
        return None
    first = _start(program, computation, loop, indices[0])
    return math.ceil((constants[0] - first) / _step(program, loop, indices[0]))


def _flattened(program: Program, computation: str) -> Iterator[Instruction]:
    return (execution.instruction for execution in _executions(program, computation, 1))


def _start(program: Program, computation: str, loop: Instruction, index: int) -> int:
    """The first value of a loop's counter, 0 unless it is a constant."""
    at = _element(program, computation, loop.operands[0], index)
    return int(at.arguments) if at is not None and at.opcode == "constant" else 0


def _step(program: Program, loop: Instruction, index: int) -> int:
    """How much a loop's counter grows in each trip, 1 unless a constant is added: loops may be unrolled."""
    (body,) = _called(loop, "body")
    by_name = {instruction.name: instruction for instruction in program.computations[body]}
    root = next(name for name, instruction in by_name.items() if instruction.root)
    at = _element(program, body, root, index)
    if at is None or at.opcode != "add":
        return 1
    added = [int(by_name[name].arguments) for name in at.operands if by_name[name].opcode == "constant"]
    return added[0] if len(added) == 1 else 1


def _element(program: Program, computation: str, name: str, index: int) -> Instruction | None:
    """What stands at an index of a tuple in a computation, before it was copied."""
    by_name = {instruction.name: instruction for instruction in program.computations[computation]}
    at = by_name.get(name)
    if at is not None and at.opcode == "tuple":
        at = by_name.get(at.operands[index])
    while at is not None and at.opcode in ("copy", "bitcast"):
        at = by_name.get(at.operands[0])
    return at


def loops_of_unknown_length(program: Program) -> int:
    """How many loops `executions` does not count because their length depends on data."""
    return sum(
        trip_count(program, execution.computation, execution.instruction) is None
        for execution in executions(program)
        if execution.instruction.opcode == "while"
    )


def one_trip(program: Program) -> Program:
    """The body of the one loop that a program is and whose length depends on data: of a decode loop, a step."""
    (loop,) = (
        execution.instruction
        for execution in executions(program)
        if execution.instruction.opcode == "while"
        and not execution.in_loop
        and trip_count(program, execution.computation, execution.instruction) is None
    )
    return dataclasses.replace(program, entry=_called(loop, "body")[0])


def collectives(program: Program, mesh: Mapping[str, int]) -> list[Collective]:
    """What devices exchange in one run of the program, the most bytes first.

    Args:
      mesh: the size of each axis, in the order in which the mesh has its devices.
    """
    shapes = shapes_of(program)
    products = {_op_name(loop) for loop in _loops(program) if _WINDOWED in _called(loop, "body")[0]}
    sums: Counter[tuple] = Counter()
    seen = set()
    for execution in executions(program):
        instruction = execution.instruction
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        axes, devices = axes_of(instruction.attributes, mesh)
        if devices == 1:
            continue
        if kind == "all-reduce" and _keeps_a_part(program.computations[execution.computation], instruction):
            kind = "reduce-scatter"
        given = [part for name in instruction.operands for part in arrays(shapes[execution.computation][name])]
        if kind == "all-gather":
            # An asynchronous one shows what it takes and what it gives.
            given = arrays(instruction.shape)[-len(given) :]
        text = ", ".join(f"{element}[{','.join(map(str, dims))}]" for element, dims in given)
        if execution.fused and (channel := re.search(r"channel_id=\d+", instruction.attributes)):
            # libtpu up to 0.0.41 shows one that runs beside others in each of the fusions that start, carry and end it.
            if (part := (channel[0], kind, text, execution.in_loop)) in seen:
                continue
            seen.add(part)
        windowed = _WINDOWED in execution.computation or _op_name(instruction) in products
        sums[kind, axes, devices, text, execution.in_loop, windowed] += execution.trips
    found = [
        Collective(kind, axes, text, count, _received(kind, bytes_of(text), devices) * count, in_loop, windowed)
        for (kind, axes, devices, text, in_loop, windowed), count in sums.items()
        if count
    ]
    return sorted(found, key=lambda collective: (-collective.bytes, collective.kind, collective.shape))


_WINDOWED = "windowed_dot_general"
"""In the names of the loops into which XLA turns a product and the collective before or behind it ("windowed einsum").
"""


def _loops(program: Program) -> Iterator[Instruction]:
    every = itertools.chain.from_iterable(program.computations.values())
    return (instruction for instruction in every if instruction.opcode == "while")


def _op_name(instruction: Instruction) -> str:
    """What the program calls an operation, or something that no other instruction is called."""
    found = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return found[1] if found else instruction.name


def shapes_of(program: Program) -> dict[str, dict[str, str]]:
    """The shape of each instruction, by computation and name."""
    return {
        name: {instruction.name: instruction.shape for instruction in instructions}
        for name, instructions in program.computations.items()
    }


def _keeps_a_part(computation: Sequence[Instruction], reduced: Instruction) -> bool:
    """Whether an all-reduce is the first half of a reduce-scatter, which libtpu writes as a fusion of the two."""
    users = [instruction for instruction in computation if reduced.name in instruction.operands]
    return [user.opcode for user in users] == ["dynamic-slice"] and users[0].root


def _received(kind: str, size: int, devices: int) -> int:
    if kind == "collective-permute":
        return size
    others = round(size * (devices - 1) / devices)
    return 2 * others if kind == "all-reduce" else others


def axes_of(attributes: str, mesh: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """The mesh axes along which the devices of a collective's groups differ, and how many devices a group has."""
    groups = _groups(attributes, math.prod(mesh.values()))
    varying = [
        axis
        for at, axis in enumerate(mesh)
        if any(len({_coordinates(device, mesh)[at] for device in group}) > 1 for group in groups)
    ]
    return tuple(varying), max(map(len, groups))


def _groups(attributes: str, devices: int) -> list[list[int]]:
    """Which devices talk to each other, given as lists, pairs, an array transposed, or axes of the compiler's mesh."""
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", attributes):
        return _lists(pairs[1])
    if lists := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes):
        return _lists(lists[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}", attributes):
        return _along_axes(*named.groups())
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\](<=\S+)", attributes):
        return _cut(_iota(iota[3]), int(iota[2]))
    return [list(range(devices))]


def _iota(text: str) -> list[int]:
    """`<=[2,4]T(1,0)`: 0, 1, ... as an array of these dims, transposed, in the order that it then has."""
    found = re.match(r"<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    assert found is not None, text
    dims = [int(dim) for dim in found[1].split(",")]
    order = [int(at) for at in found[2].split(",")] if found[2] else list(range(len(dims)))
    strides = [math.prod(dims[at + 1 :]) for at in range(len(dims))]
    points = itertools.product(*(range(dims[at]) for at in order))
    return [sum(part * strides[at] for part, at in zip(point, order, strict=True)) for point in points]


def _cut(ids: Sequence[int], size: int) -> list[list[int]]:
    return [list(ids[at : at + size]) for at in range(0, len(ids), size)]


def _along_axes(sizes: str, order: str, axes: str) -> list[list[int]]:
    """Groups along `'a','b':(2)4` in a mesh `'a'=2,'b'=8`: of b, 4 devices of which the first 2 times as many are."""
    mesh = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", sizes)}
    wanted = {name: (int(before or 1), int(part or mesh[name])) for name, before, part in re.findall(_AXIS, axes)}
    permuted = re.search(r"<=\S+?\](?:T\([\d,]+\))?", order)
    ids = _iota(permuted[0]) if permuted else list(range(math.prod(mesh.values())))
    groups: dict[tuple, list[int]] = {}
    for place, device in enumerate(ids):
        others = []
        for (name, size), at in zip(mesh.items(), _coordinates(place, mesh), strict=True):
            before, part = wanted.get(name, (1, 1))
            after = size // (before * part)
            others.append((at // (part * after), at % after))
        groups.setdefault(tuple(others), []).append(device)
    return list(groups.values())


_AXIS = r"'(\w+)'(?::\((\d+)\)(\d+))?"


def _lists(text: str) -> list[list[int]]:
    return [[int(device) for device in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)]


def _coordinates(device: int, mesh: Mapping[str, int]) -> list[int]:
    found = []
    for size in reversed(list(mesh.values())):
        device, rest = divmod(device, size)
        found.append(rest)
    return found[::-1]
