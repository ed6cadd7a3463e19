"""Write a safetensors file one array at a time.

MLX's own writer computes all arrays first, which for arrays that still lie on
disk is a whole shard in memory, and reports a full disk in words of its own.
Format: https://huggingface.co/docs/safetensors
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx

_NAMES = {"bool_": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "uint32": "U32",
          "int32": "I32", "uint64": "U64", "int64": "I64", "float16": "F16", "bfloat16": "BF16", "float32": "F32",
          "float64": "F64"}


def write(path: Path, arrays: dict[str, "mx.array"], metadata: dict[str, str]) -> None:
    """Write ``arrays`` and empty the dictionary, so that each array's memory is free once it is written."""
    header: dict = {"__metadata__": metadata}
    position = 0
    for name, array in arrays.items():
        header[name] = {"dtype": _NAMES[str(array.dtype).removeprefix("mlx.core.")], "shape": list(array.shape),
                        "data_offsets": [position, position + array.nbytes]}
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begin at a multiple of eight
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while arrays:
            file.write(_octets(arrays.pop(next(iter(arrays)))))


def _octets(array: "mx.array") -> memoryview:
    import mlx.core as mx

    if not array.size:
        return memoryview(b"")
    flat = mx.contiguous(array).reshape(-1)
    mx.eval(flat)
    return memoryview(flat.view(mx.uint16) if array.dtype == mx.bfloat16 else flat).cast("B")
