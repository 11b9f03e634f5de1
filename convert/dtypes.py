"""The three number formats of weights, their names in files, and what a cast does to the numbers."""

import ml_dtypes
import numpy as np

BFLOAT16, FLOAT16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)

BY_NAME = {dtype.name: dtype for dtype in (BFLOAT16, FLOAT16, FLOAT32)}
"""By the name that config.json, zarr and this project's options use."""

SAFETENSORS = {"BF16": BFLOAT16, "F16": FLOAT16, "F32": FLOAT32}
SAFETENSORS_NAME = {dtype: name for name, dtype in SAFETENSORS.items()}

_EXPONENT = {BFLOAT16: ("u2", 0x7F80), FLOAT16: ("u2", 0x7C00), FLOAT32: ("u4", 0x7F800000)}
_BLOCK = 1 << 16  # numbers looked at together: a scratch that stays in the processor's cache


def weight_dtype(dtype: object) -> np.dtype:
    """The numpy dtype that `dtype` (a name, a numpy or a JAX dtype) stands for.

    Raises:
      ValueError: unless it is bfloat16, float16 or float32.
    """
    try:
        found = BY_NAME.get(dtype) if isinstance(dtype, str) else BY_NAME.get(np.dtype(dtype).name)  # type: ignore[call-overload]
    except TypeError:
        found = None
    if found is None:
        raise ValueError(f"weights can be {', '.join(BY_NAME)}, got dtype {dtype!r}")
    return found


def count_nonfinite(numbers: np.ndarray) -> int:
    """How many of `numbers` (flat; one of the three dtypes) are NaN or infinite.

    Looks at the exponent bits, which is several times faster than isfinite on 16-bit formats.
    """
    integer, mask = _EXPONENT[numbers.dtype]
    bits, scratch, count = numbers.view(integer), np.empty(_BLOCK, integer), 0
    for start in range(0, bits.size, _BLOCK):
        block = bits[start : start + _BLOCK]
        exponents = np.bitwise_and(block, mask, out=scratch[: block.size])
        if exponents.max() == mask:
            count += int(np.count_nonzero(exponents == mask))
    return count


def cast(numbers: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`numbers` in `dtype`, rounded to nearest even, too large ones to infinity; no copy if they are in it already."""
    with np.errstate(over="ignore", invalid="ignore"):  # both are counted and reported by who asked for the cast
        return numbers.astype(dtype, copy=False)
