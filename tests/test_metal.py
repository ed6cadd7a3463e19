"""The emulation of Metal in ``tests/metal``, on the kernel of the column sweep."""

import mlx.core as mx
import numpy as np
import pytest
from metal import Compiler, NotEmulated, OutOfBounds, Rejected, Undefined, Unsettled

from mlxquant.kernels import column_sweep


@pytest.fixture
def emulation(emulate, monkeypatch):
    made = emulate()
    made.install(monkeypatch, column_sweep)
    return made


def problem(rows, width, levels, scales="mixed", seed=0):
    """Arguments of ``round_columns``; mixed scales are of both signs, and some are zero."""
    random = np.random.default_rng(seed)
    weight, wanted, size = (random.normal(size=(rows, width)).astype(np.float32) for _ in range(3))
    size = (np.abs(size) + 0.1) * 3 / levels
    signs = {"mixed": [-1, 0, 1, 1, 1], "zero": [0], "negative": [-1]}[scales]
    size = (size * random.choice(signs, (rows, width))).astype(np.float32)
    feedback = np.triu(random.normal(size=(width, width)), 1).astype(np.float32) / np.float32(width)
    arrays = (weight, wanted, size, -size * (levels - 1) / 2, feedback)
    return *map(mx.array, arrays), levels


def assert_kernel_is_reference(arguments):
    codes, errors = (np.array(x) for x in column_sweep._launch(*arguments))
    expected_codes, expected_errors = (np.array(x) for x in column_sweep.reference(*arguments))
    same = codes == expected_codes
    assert same.mean() > 0.999  # a tie broken differently in float32
    assert np.allclose(errors[same], expected_errors[same], rtol=1e-5, atol=1e-5)
    return codes, errors


@pytest.mark.parametrize("levels", [2, 3, 4, 16])
@pytest.mark.parametrize("width", [1, 7, 64])
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 130])
def test_the_column_sweep_is_its_reference(emulation, rows, width, levels):
    codes, _ = assert_kernel_is_reference(problem(rows, width, levels))
    if codes.size > 1000:
        assert set(codes.flat) == set(range(levels))  # so that equality says something


@pytest.mark.parametrize("scales", ["zero", "negative"])
def test_scales_that_are_zero_or_negative(emulation, scales):
    arguments = problem(65, 64, 4, scales)
    codes, errors = assert_kernel_is_reference(arguments)
    weight, _, size, biases, _, _ = (np.array(x) for x in arguments)
    assert np.allclose(errors, size * codes + biases - weight, atol=1e-5)


def test_the_package_would_trust_this_kernel(emulation):
    assert column_sweep.disagreement() <= column_sweep.TIES


def test_each_template_is_compiled_once(emulation, tmp_path):
    emulation.compiler = Compiler(tmp_path)
    column_sweep._launch(*problem(9, 8, 3))
    column_sweep._launch(*problem(9, 8, 3, seed=1))
    assert emulation.compiler.compiled == 1 == len(list(tmp_path.iterdir()))


@pytest.mark.parametrize("correct, wrong, complaint, says", [
    ("if (row >= sizes[0]) return;", "", OutOfBounds,
     r"thread \(20\d\d, 0, 0\).* past the end of `"),
    ("= wanted[at];", "= wanted[at - 1];", OutOfBounds, "4 bytes before `wanted`"),
    ("= wanted[at];", "= wanted[at + 1];", OutOfBounds,
     r"thread \(20\d\d, 0, 0\).* 0 bytes past the end of `wanted`"),
    ("codes[at] = kept[p];", "const_cast<device float*>(weight)[at] = kept[p];", OutOfBounds,
     "in read-only `weight`"),
    ("kept[p] = code", "kept[p + 1] = code", Undefined, r"thread \(0, 0, 0\)"),
    ("errors[at] =", "if (lane) errors[at] =", Unsettled, "byte 0 of `errors` was not written"),
    ("codes[at] = kept[p];", "codes[at] = kept[p]; codes[0] = row;", Unsettled,
     "order of threads"),
    ("const int at", "const constant float* other = weight; const int at", Rejected,
     r"type 'constant float const \*' with an lvalue of type 'device float const \*'"),
    ("const int at", "thread float* other = codes; const int at", Rejected,
     r"type 'float \*' with an lvalue of type 'device float \*'"),
    ("const int at", "threadgroup float other[4]; const int at", NotEmulated, "threadgroup"),
    ("const int at", "simdgroup_barrier(mem_flags::mem_none); const int at", NotEmulated,
     "simdgroup_barrier"),
    ("const int at", "float other = simd_max(weight[0]); const int at", NotEmulated, "simd_max"),
    ("const int at", "float other = lane % 2 ? simd_sum(weight[0]) : 0; const int at", Undefined,
     r"thread \(\d+, 0, 0\)"),
], ids=["bound", "before", "after", "input", "local", "unwritten", "race", "constant", "thread",
        "threadgroup", "barrier", "simd", "divergent"])
def test_an_injected_fault_is_seen(emulation, monkeypatch, correct, wrong, complaint, says):
    kernel = column_sweep._KERNEL
    assert correct in kernel.body
    monkeypatch.setattr(kernel, "body", kernel.body.replace(correct, wrong))
    with pytest.raises(complaint, match=says):
        column_sweep._launch(*problem(65, 7, 4))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_small_floats_vectors_and_indices(emulate, dtype):
    """What the column sweep does not use of the stand-in library; a threadgroup cut short."""
    kernel = emulate(alignment=8).metal_kernel(
        name="small", input_names=["x", "scale", "offset"],
        output_names=["rounded", "scaled", "where"], source="""
            uint at = thread_position_in_grid.x;
            rounded[at] = static_cast<T>(float(x[at]) * scale[at] + offset);
            auto pair = reinterpret_cast<const device float2*>(scale)[at / 2];
            scaled[at] = dot(half2(pair), half2(int2(max(pair, float2(2.0f)))));
            where[at] = threadgroup_position_in_grid.x * 1000 + simdgroup_index_in_threadgroup * 100
                + thread_index_in_simdgroup + threads_per_threadgroup.x * 10000;
        """)
    random = np.random.default_rng(0)
    x, scale = (mx.array(random.normal(size=70), mx.float32) * 3 for _ in range(2))
    x = x.astype(dtype)
    rounded, scaled, where = kernel(
        inputs=[x, scale, 1.0], template=[("T", dtype)], grid=(70, 1, 1), threadgroup=(48, 1, 1),
        output_shapes=[(70,)] * 3, output_dtypes=[dtype, mx.float16, mx.uint32])
    assert mx.array_equal(rounded, (x.astype(mx.float32) * scale + 1).astype(dtype))
    pairs = np.array(scale).reshape(35, 2)
    products = pairs.astype(np.float16) * np.maximum(pairs, 2).astype(np.int32).astype(np.float16)
    assert np.array_equal(np.array(scaled), np.repeat(products[:, 0] + products[:, 1], 2))
    assert np.array(where)[[0, 47, 48, 69]].tolist() == [480000, 480115, 221000, 221021]
