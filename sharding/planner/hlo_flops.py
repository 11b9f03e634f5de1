"""Floating-point operations of a compiled program, read from its text, loops multiplied out."""

import math
import re
from collections.abc import Mapping

from sharding.planner.hlo import Instruction, Program, arrays, executions, shapes_of


def flops(program: Program) -> int:
    """Of matrix products and of kernels that say how many they take, on one device, in one run.

    Elementwise work, which a chip does beside, is not counted, nor are loops whose length depends on data. Grouped
    products count with all the rows that there is room for.
    """
    shapes = shapes_of(program)
    return sum(
        execution.trips * _flops(execution.instruction, shapes[execution.computation])
        for execution in executions(program)
    )


def _flops(instruction: Instruction, shapes: Mapping[str, str]) -> int:
    if instruction.opcode == "dot":
        return _dot(instruction, shapes)
    if instruction.opcode == "convolution":
        return _convolution(instruction, shapes)
    if instruction.opcode == "custom-call":
        stated = re.search(r'"cost_estimate":\{"flops":"?(\d+)', instruction.attributes)
        return int(stated[1]) if stated else 0
    return 0


def _dims(shape: str) -> tuple[int, ...]:
    return arrays(shape)[0][1]


def _dot(instruction: Instruction, shapes: Mapping[str, str]) -> int:
    left = _dims(shapes[instruction.operands[0]])
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    assert contracted is not None, instruction.name
    inner = math.prod(left[int(at)] for at in contracted[1].split(",") if at)
    return 2 * math.prod(_dims(instruction.shape)) * inner


def _convolution(instruction: Instruction, shapes: Mapping[str, str]) -> int:
    """Products in a convolution, as which libtpu writes every matrix product; dims may play the part of a window."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None, instruction.name
    left, right, out = (
        dict(zip(letters, _dims(shape), strict=True))
        for letters, shape in zip(
            labels.groups(), [*(shapes[name] for name in instruction.operands[:2]), instruction.shape], strict=True
        )
    )
    pairs = math.prod(
        _pairs(left[at], right[at], out[at], _window(instruction.attributes, int(at))) for at in right if at.isdecimal()
    )
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    return 2 * out["b"] * out["f"] * right["i"] * pairs // (int(groups[1]) if groups else 1)


def _window(attributes: str, at: int) -> Mapping[str, str]:
    """Stride, padding and dilations along one spatial dim, where they are not the default."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(field.split("=") for field in found[1].split()) if found else {}
    return {name: values.split("x")[at] for name, values in fields.items()}


def _pairs(size: int, kernel: int, out: int, window: Mapping[str, str]) -> int:
    """How many (place in the result, place in the kernel) meet an element of the input and not its padding."""
    stride, spread = int(window.get("stride", 1)), int(window.get("lhs_dilate", 1))
    dilation, low = int(window.get("rhs_dilate", 1)), int(window.get("pad", "0_0").split("_")[0])
    count = 0
    for place in range(kernel):
        for result in range(out):
            at = result * stride + place * dilation - low
            count += 0 <= at <= (size - 1) * spread and at % spread == 0
    return count
