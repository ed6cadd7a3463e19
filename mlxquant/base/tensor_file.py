"""Write a safetensors file one array at a time, and refuse values that are infinite or NaN.

MLX's own writer computes all arrays first: arrays that are still on disk then fill memory with a
whole shard.
Format: https://huggingface.co/docs/safetensors
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxquant.base.errors import BadCheckpoint

if TYPE_CHECKING:
    import mlx.core as mx

_TYPES = {"bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16",
          "uint32": "U32", "int32": "I32", "uint64": "U64", "int64": "I64", "float16": "F16",
          "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
# The bits of the exponent: all are set in a value that is not finite, and in no other value.
_EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F80_0000,
              "float64": 0x7FF0_0000_0000_0000}
_AT_ONCE = 1 << 24  # values that are tested together, with twice their memory


def write(path: Path, arrays: dict[str, "mx.array"], metadata: dict[str, str]) -> None:
    """Write ``arrays``, and take each out of the dictionary, so that its memory can be freed.

    Raises ``BadCheckpoint`` naming an array with a value that is not finite.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    for name, array in arrays.items():
        header[name] = {"dtype": _TYPES[_type(array)], "shape": list(array.shape),
                        "data_offsets": [position, position + array.nbytes]}
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begin at a multiple of eight
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while arrays:
            array = arrays.pop(name := next(iter(arrays)))
            if array.size:
                require_finite(name, array)
                file.write(memoryview(_words(array)).cast("B"))


def require_finite(name: str, array: "mx.array") -> None:
    """Raise ``BadCheckpoint`` where a value of ``array`` is infinite or not a number."""
    import mlx.core as mx  # not at the top: ``blas.py`` imports this folder before OpenBLAS
    import numpy as np

    exponent = _EXPONENTS.get(_type(array))
    if exponent is None or not array.size:
        return
    # On a CPU NumPy reads the bits ten times as fast as MLX tests the numbers.
    words = _words(array) if mx.default_device() == mx.gpu else np.asarray(_words(array))
    wrong = sum(int(((words[start:start + _AT_ONCE] & exponent) == exponent).sum())
                for start in range(0, array.size, _AT_ONCE))
    if wrong:
        raise BadCheckpoint(f"tensor {name}: {wrong} of {array.size} values are infinite or "
                            "not numbers")


def _type(array: "mx.array") -> str:
    return str(array.dtype).removeprefix("mlx.core.").rstrip("_")


def _words(array: "mx.array") -> "mx.array":
    """The bits of an array as unsigned integers, computed and in one piece."""
    import mlx.core as mx  # see above

    flat = mx.contiguous(array).reshape(-1)
    words = flat.view(getattr(mx, f"uint{8 * array.itemsize}"))
    mx.eval(words)
    return words
