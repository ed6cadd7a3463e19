"""Every GGUF type on real weights: what the import keeps, and what it adds to the type's own error.

    pip install xllamacpp; python benchmarks/gguf_types.py [--layers 4]

Blocks are made by ggml's own quantiser (through xllamacpp's build of it) from down_proj matrices of
the default model, moved off the grid that they came on by noise of the size of its rounding. Errors
are Σ(ŵ − w)² / Σw²: ``own`` that of the type against the weights it was made of, ``added`` that of
the import against the ``gguf`` package's decoder, ``total`` that of the import against the weights.
"""

import ctypes
import time
from importlib.metadata import version
from typing import Any

from record import parser, save  # first: it loads the BLAS before MLX

# isort: split
import gguf
import mlx.core as mx
import numpy as np
import xllamacpp
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

import mlxquant
from mlxquant.base.errors import Unsupported
from mlxquant.sources.gguf import repack, weights
from mlxquant.sources.gguf.repack import GROUP
from mlxquant.sources.names import DEFAULT_MODEL


def ggml_blocks(values: np.ndarray, type_: Type) -> np.ndarray:
    """``values`` (rows, n) float32 as ggml quantises them, every input equally important."""
    if type_ in (Type.F32, Type.F16, Type.BF16):
        return gguf.quantize(values, type_).view(np.uint8).reshape(len(values), -1)
    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    quantise, size = library.ggml_quantize_chunk, library.ggml_row_size
    quantise.restype = size.restype = ctypes.c_size_t
    rows, columns = values.shape
    block, block_bytes = GGML_QUANT_SIZES[type_]
    blocks = np.zeros((rows, columns // block * block_bytes), np.uint8)
    importance = np.ones(columns, np.float32)
    written = quantise(ctypes.c_int(type_), values.ctypes.data_as(ctypes.c_void_p),
                       blocks.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(0),
                       ctypes.c_int64(rows), ctypes.c_int64(columns),
                       importance.ctypes.data_as(ctypes.c_void_p))
    if written != blocks.nbytes:
        raise RuntimeError(f"ggml wrote {written} bytes of {type_.name}, not {blocks.nbytes}")
    return blocks


def off_grid(values: np.ndarray) -> np.ndarray:
    """Each weight moved by up to half a step: they came as Q4_1, and that type would look free."""
    groups = values.reshape(-1, 32)
    steps = (groups.max(1, keepdims=True) - groups.min(1, keepdims=True)) / 15
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, groups.shape).astype(np.float32)
    return (groups + steps * noise).reshape(values.shape)


def error(values: np.ndarray, reference: np.ndarray) -> float:
    reference = reference.astype(np.float64)
    return float(np.square(values - reference).sum() / np.square(reference).sum())


def imported(type_: Type, blocks: np.ndarray, plan: weights.TensorPlan) -> np.ndarray:
    """What MLX makes of the import, in float32."""
    if plan.plain:
        dtype = {Type.F32: mx.float32, Type.BF16: mx.bfloat16}.get(type_, mx.float16)
        return np.array(weights.plain(type_, blocks, dtype)[0].astype(mx.float32))
    made = weights.codes("w", type_, blocks, plan)
    scales, biases = (mx.array(a).astype(mx.float32) for a in (made.scales, made.biases))
    return np.array(mx.dequantize(mx.array(made.weight), scales, biases, group_size=GROUP,
                                  bits=made.bits))


def scale_precision(type_: Type, blocks: np.ndarray, decoded: np.ndarray) -> dict[str, float]:
    """The error of repacked codes under scales and biases of each width."""
    groups, result = repack.LAYOUTS[type_].read(blocks), {}
    codes = groups.codes.reshape(*groups.scales.shape, GROUP).astype(np.float32)
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        scales, biases = (np.array(mx.array(a).astype(dtype).astype(mx.float32))[..., None]
                          for a in (groups.scales, groups.biases))
        values = (scales * codes + biases).reshape(decoded.shape)
        result[str(dtype).removeprefix("mlx.core.")] = error(values, decoded)
    return result


def row(type_: Type, values: np.ndarray) -> dict[str, Any]:
    block, block_bytes = GGML_QUANT_SIZES[type_]
    entry = {"type": type_.name, "bits_per_weight": 8 * block_bytes / block}
    try:
        plan = weights.plan("w", type_, True)
    except Unsupported as refusal:
        return entry | {"stored": "refused", "reason": str(refusal).split(";")[0]}
    blocks = ggml_blocks(values, type_)
    decoded = gguf.dequantize(blocks, type_).reshape(values.shape)
    start = time.perf_counter()
    made = imported(type_, blocks, plan)
    seconds = time.perf_counter() - start
    exact = np.array_equal(made, decoded)
    kind = "same codes, scales rounded to float16" if plan.repacked else "rounded anew"
    entry |= {"stored": "exact" if exact else kind, "bits": plan.bits,
              "stored_bits_per_weight": plan.bits if plan.plain else plan.bits + 1,
              "own": error(decoded, values), "added": error(made, decoded),
              "total": error(made, values), "gb_per_s": blocks.nbytes / seconds / 1e9}
    if type_ in repack.LAYOUTS:
        entry["added_by_scale"] = scale_precision(type_, blocks, decoded)
    if not plan.repacked and type_ not in weights.PLAIN:
        plans = {bits: weights.plan("w", type_, True, bits)
                 for bits in (*weights.WIDTHS, weights.UNROUNDED)}
        entry["added_by_width"] = {bits: error(imported(type_, blocks, plan), decoded)
                                   for bits, plan in plans.items()}
    return entry


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=4)
    layers = options.parse_args().layers
    network = mlxquant.load(DEFAULT_MODEL, dense=True).network
    values = off_grid(np.concatenate([np.array(block.mlp.down_proj.weight)
                                      for block in network.layers[:layers]]))
    rows = []
    for type_ in Type:
        rows.append(row(type_, values))
        r = rows[-1]
        print(f"{r['type']:8} {r['bits_per_weight']:6.2f} {r['stored']}" + (
            f", {r['bits']} bits: own {r['own']:.2e}, added {r['added']:.2e}, "
            f"total {r['total']:.2e}, {r['gb_per_s']:.2f} GB/s" if "own" in r else ""), flush=True)
    print(save("gguf-types", model=DEFAULT_MODEL, layers=layers, shape=list(values.shape),
               gguf=version("gguf"), xllamacpp=version("xllamacpp"), rows=rows))


if __name__ == "__main__":
    main()
