"""Kernels of replicated layers: their Metal source executed on the CPU, against references.

Every width, K, G and float type appears; the slow tests have every combination of these, each with
a rotation, a number of columns and of tokens drawn for it.
"""

import itertools
import json
import random
from contextlib import contextmanager
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from metal import OutOfBounds, Unsettled
from typer.testing import CliRunner

from mlxquant.cli import app
from mlxquant.codes.packing import pack_codes
from mlxquant.codes.spec import REPLICA_WIDTHS
from mlxquant.codes.width import Width
from mlxquant.kernels import (
    backend,
    check,
    code_order,
    expand_codes,
    prepare_input,
    replicated_matvec,
    rotary,
)
from mlxquant.kernels.cases import Case
from mlxquant.kernels.first_step import AsIs, Gate, Norm
from mlxquant.kernels.matrix import Matrix

F32, F16, BF16 = mx.float32, mx.float16, mx.bfloat16
KERNELS = [prepare_input, replicated_matvec, expand_codes, rotary]
SUBSET = [Case(Width.of(bits), *rest) for bits, *rest in [
    (1, 1, 0, 0, 5, 64, 1, F32), (1, 4, 16, 64, 9, 192, 2, F16), (2, 4, 0, 64, 13, 192, 1, F32),
    (2, 8, 16, 64, 6, 1344, 3, F16), (2, 16, 0, 4, 3, 100, 2, BF16), (2, 2, 64, 0, 4, 64, 8, F32),
    ("ternary", 4, 0, 32, 8, 96, 1, BF16), ("ternary", 5, 8, 8, 5, 40, 4, F32),
    (3, 4, 0, 64, 7, 320, 2, F16),
    (3, 3, 32, 2, 9, 98 - 2, 1, F32), (4, 1, 0, 128, 5, 1152, 5, F32),
    (4, 8, 64, 64, 17, 128, 1, BF16),
    (2, 4, 0, 1024, 4, 1024, 1, F32), (2, 1, 0, 0, 2, 1, 1, F32), (4, 4, 0, 1, 2, 33, 8, F16),
    (2, 3, 0, 64, 5, 64, 8, F16)]]
MIXTURES = [Case(Width.of(bits), *rest) for bits, *rest in [
    (2, 4, 0, 64, 13, 192, 1, F32, 4), (2, 8, 16, 64, 10, 192, 2, F16, 3),
    ("ternary", 3, 8, 32, 5, 96, 3, BF16, 7), (3, 4, 0, 0, 7, 99, 1, F32, 2),
    (1, 16, 64, 256, 6, 256, 2, F32, 5), (4, 2, 0, 64, 3, 320, 8, F16, 4)]]
ALLOWED = {F32: 1e-5, F16: 2e-3, BF16: 8e-3}


def every_combination():
    """Widths share what else is drawn, and so kernels that do not depend on them."""
    draw = random.Random(0)
    for replicas, group, dtype in itertools.product(
            (1, 2, 3, 4, 8, 16), (0, 8, 16, 32, 64), (F32, F16, BF16)):
        rotation, inputs, tokens = map(draw.choice, ((0, 64), (64, 1088), (1, 3, 8)))
        for bits in REPLICA_WIDTHS:
            yield Case(bits, replicas, group, rotation, 9, inputs, tokens, dtype)


CASES = SUBSET + [pytest.param(case, marks=pytest.mark.slow) for case in every_combination()]


@contextmanager
def installed(made, monkeypatch):
    """Every kernel of replicated layers through the emulation ``made``."""
    for module in KERNELS:
        made.install(monkeypatch, module)
    mx.disable_compile()  # an emulated kernel wants numbers, not tracers
    yield made
    mx.enable_compile()


@pytest.fixture
def emulation(emulate, monkeypatch):
    with installed(emulate(alignment=16), monkeypatch) as made:
        yield made


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 100, 129])
@pytest.mark.parametrize("bits", REPLICA_WIDTHS)
def test_codes_survive_the_kernels_order(bits, columns):
    codes = np.random.default_rng(columns).integers(0, bits.levels, (3, columns)).astype(np.uint8)
    words = code_order.reorder(pack_codes(mx.array(codes), bits), bits, columns)
    assert words.shape[2] == bits.code_bits
    assert words.shape[1] * 32 % code_order.RUN[words.shape[2]] == 0
    np.testing.assert_array_equal(np.array(code_order.unpack(words, columns)), codes)


@pytest.mark.parametrize("width, pairs_in_word", [(1, 16), (2, 8), (4, 4)])
def test_one_mask_leaves_a_pair_of_neighbours(width, pairs_in_word):
    codes = mx.array([[j * 7 % 2**width for j in range(32)]])
    words = np.array(code_order.pack(codes, width))[0, 0]
    for pair in range(16):
        shifted = int(words[pair // pairs_in_word]) >> width * (pair % pairs_in_word)
        masked = shifted & (2**width - 1) * 0x10001
        assert [masked & 0xFFFF, masked >> 16] == codes[0, 2 * pair:2 * pair + 2].tolist()


def test_reordering_some_rows_at_a_time_changes_nothing(monkeypatch):
    packed = pack_codes(mx.array(np.random.default_rng(0).integers(0, 8, (7, 96))), Width.THREE)
    whole = code_order.reorder(packed, Width.THREE, 96)
    monkeypatch.setattr(code_order, "_AT_ONCE", 200)
    assert mx.array_equal(code_order.reorder(packed, Width.THREE, 96), whole)


@pytest.mark.parametrize("step", [AsIs, Norm, Gate])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_prepared_inputs_are_the_reference(emulation, case, step):
    assert check._prepare(case, step) <= ALLOWED[case.dtype]


@pytest.mark.parametrize("dtype, weight_dtype", [(F16, F16), (BF16, BF16), (F16, F32), (F32, BF16)])
def test_a_norm_and_a_gate_are_their_definitions(emulation, dtype, weight_dtype):
    """In float64, rounded to the type that a block's own operations give."""
    case = Case(Width.TWO, 3, 0, 32, 2, 608, 3, F32)
    x, matrix = case.draw()
    scales = matrix.scales
    x, other = x.astype(dtype), case.draw(1)[0].astype(dtype)
    weight = case.draw(2)[0][0].astype(weight_dtype)
    layout = replicated_matvec.layout(case.shape, dtype, case.tokens)
    exact = [np.array(a.astype(F32), np.float64) for a in (x, other, weight)]
    normed = exact[0] / np.sqrt((exact[0] ** 2).mean(1, keepdims=True) + 0.5) * exact[2]
    gated = exact[0] / (1 + np.exp(-exact[0])) * exact[1]
    allowed = max(ALLOWED[dtype], ALLOWED[weight_dtype]) / 2
    for first, given, expected in ((Norm(weight, 0.5), x, normed),
                                   (Gate(), mx.concatenate([x, other], 1), gated)):
        assert first.dtype(given) == first(given).dtype
        found = prepare_input.prepare(given, scales, layout, first)
        for reference in (prepare_input.reference(mx.array(expected, F32), scales, layout),
                          prepare_input.reference(given, scales, layout, first)):
            assert backend.relative_error(found, reference) <= allowed


def exact_product(case: Case, matrix: Matrix, rotated: np.ndarray) -> np.ndarray:
    """y of one matrix in float64 from its definition, replica by replica."""
    scales, codes = matrix.scales, matrix.codes.reshape(case.rows, *matrix.codes.shape[-2:])
    levels = case.bits.lowest + case.bits.distance * np.arange(case.bits.levels)
    dense = levels[np.array(code_order.unpack(codes, case.inputs))]
    a = np.array(scales.replica_in, np.float64).reshape(-1, case.replicas)
    a = np.repeat(a, case.group or 1, axis=0)
    if case.group:
        a = a * np.array(scales.column_scale, np.float64).reshape(-1, 1)
    b = np.array(matrix.replica_out.astype(F32), np.float64).reshape(case.rows, -1)
    return sum(np.atleast_2d(rotated * a[:, k]) @ dense.T * b[:, k] for k in range(case.replicas))


def near(found: mx.array, expected: np.ndarray, dtype: mx.Dtype) -> None:
    difference = np.linalg.norm(np.array(found.astype(F32), np.float64) - expected)
    assert difference <= ALLOWED[dtype] * np.linalg.norm(expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_product_is_the_reference_and_a_float64_product(emulation, case):
    assert check._matvec(case) <= ALLOWED[case.dtype]
    x, matrix = case.draw()
    layout = replicated_matvec.layout(case.shape, case.dtype, case.tokens)
    prepared = prepare_input.reference(x, matrix.scales, layout)
    y = replicated_matvec.multiply(prepared, matrix, case.tokens, case.dtype)
    near(y, exact_product(case, matrix, np.array(matrix.scales.rotated(x), np.float64)), case.dtype)


@pytest.mark.parametrize("case", MIXTURES, ids=str)
def test_each_pair_goes_through_its_own_expert(emulation, case):
    assert check._experts(case) <= ALLOWED[case.dtype]
    x, stack = case.draw()
    layout, chosen = replicated_matvec.layout(case.shape, case.dtype), case.chosen()
    prepared = prepare_input.prepare(x, stack.scales, layout, experts=chosen)
    y = replicated_matvec.multiply(prepared, stack, len(chosen), case.dtype, chosen)
    rotated = np.array(stack.scales.rotated(x), np.float64)
    expected = [exact_product(case, stack.part(slice(expert, expert + 1)), rotated[pair // 3])
                for pair, expert in enumerate(chosen.tolist())]
    near(y, np.concatenate(expected), case.dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_expanded_codes_are_the_reference(emulation, case):
    assert check._expand(case) <= ALLOWED[case.dtype]


@pytest.mark.parametrize("module, correct, wrong, complaint", [
    (replicated_matvec, "lane, chunks - 1)", "lane, chunks)", OutOfBounds),
    (replicated_matvec, "row = min(row0 + r, rows - 1);", "row = row0 + r;", OutOfBounds),
    (replicated_matvec, "(chunks + 31) / 32", "(chunks + 63) / 32", OutOfBounds),
    (replicated_matvec, "if (lane == 0 && ", "if (lane == 0 && row0 && ", Unsettled),
    (prepare_input, "if (column < n) {", "if (column < padded) {", OutOfBounds),
    (prepare_input, "if (column >= padded) continue;", "", OutOfBounds),
    (prepare_input, "at < n ? ", "at < n + 512 ? ", OutOfBounds),
    (prepare_input, "(2 * row + 1) * n", "(2 * row + 2) * n", OutOfBounds),
    (expand_codes, "if (whole) weight", "weight", Unsettled),  # the neighbour row's first element
], ids=["chunk", "row", "input beyond", "unwritten", "input", "output", "square", "up", "odd"])
def test_an_injected_fault_is_seen(emulation, monkeypatch, module, correct, wrong, complaint):
    assert correct in module._KERNEL.body
    monkeypatch.setattr(module._KERNEL, "body", module._KERNEL.body.replace(correct, wrong))
    runs = {replicated_matvec: [check._matvec], expand_codes: [check._expand],
            prepare_input: [partial(check._prepare, step=step) for step in (AsIs, Norm, Gate)],
            }[module]
    with pytest.raises(complaint):
        for run in runs:
            # prepared for tensor cores too: 128 inputs in a block
            run(Case(Width.THREE, 4, 0, 0, 13, 99, 1, F16))


@pytest.mark.parametrize("module, correct, wrong", [
    (replicated_matvec, "static_cast<size_t>(expert)", "static_cast<size_t>(expert + 1)"),
    (replicated_matvec, "(expert * groups", "((expert + 1) * groups"),
    (replicated_matvec, "(expert * rows", "((expert + 1) * rows"),
    (prepare_input, "column_scale[expert * n", "column_scale[(expert + 1) * n"),
    (prepare_input, "token / sizes[4]", "token"),
    (expand_codes, "static_cast<size_t>(expert)", "static_cast<size_t>(expert + 1)"),
    (expand_codes, "int j = expert * n", "int j = (expert + 1) * n"),
], ids=["codes", "sums", "out", "column", "row", "expanded codes", "expanded scales"])
def test_an_expert_beyond_the_last_is_seen(emulation, monkeypatch, module, correct, wrong):
    assert correct in module._KERNEL.body
    monkeypatch.setattr(module._KERNEL, "body", module._KERNEL.body.replace(correct, wrong))
    with pytest.raises(OutOfBounds):
        check._experts(Case(Width.TWO, 8, 16, 64, 10, 192, 2, F16, experts=3))


def test_a_kernel_that_disagrees_is_not_used_and_says_so_once(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("MLXQUANT_CACHE", str(tmp_path))
    assert not backend.trusted("worse", lambda: 0.5, 0.1)
    assert not backend.trusted("broken", lambda: 1 / 0, 0.1)
    assert backend.trusted("good", lambda: 0.01, 0.1)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "worse" in said[0] and "0.5" in said[0] and "division" in said[1]
    monkeypatch.setattr(backend, "_answers", {})  # a new process reads what this one found
    assert not backend.trusted("worse", lambda: 0.0, 0.1)
    assert backend.trusted("good", lambda: 1.0, 0.1)
    assert backend.trusted("broken", lambda: 0.0, 0.1)  # memory may have been short before
    assert not capsys.readouterr().err
    monkeypatch.setattr(backend, "_answers", {})
    monkeypatch.setattr(backend, "_sources", lambda: "another")  # whose answers say nothing of it
    assert backend.trusted("worse", lambda: 0.0, 0.1)


def test_a_layer_that_asks_again_reads_no_file(monkeypatch, tmp_path):
    monkeypatch.setenv("MLXQUANT_CACHE", str(tmp_path))
    monkeypatch.setattr(backend, "_answers", {})
    monkeypatch.setattr(backend, "has_gpu", lambda: True)
    monkeypatch.setattr(check._Check, "worst", lambda self: 0.5)
    reads, read = [], backend.cached
    monkeypatch.setattr(backend, "cached", lambda *of: reads.append(of) or read(*of))
    assert check.trusted("expand_codes")
    once = len(reads)
    assert once and all(check.trusted("expand_codes") for _ in range(5)) and len(reads) == once


def test_no_kernel_is_trusted_without_a_gpu():
    assert not any(check.trusted(name) for name in check.CHECKS) or backend.has_gpu()


def test_the_table_of_all_kernels_shows_what_agrees_and_what_does_not(emulation, monkeypatch):
    monkeypatch.setattr(backend, "has_gpu", lambda: True)
    monkeypatch.setattr(check, "pending", lambda: [
        ("replicated_matvec", "small", 1e-5, lambda: check._matvec(SUBSET[5])),
        ("worse", "small", 1e-5, lambda: 0.5), ("broken", "small", 1e-5, lambda: 1 / 0)])
    result = CliRunner().invoke(app, ["check", "--json"])
    assert result.exit_code == 1
    rows = json.loads(result.stdout)
    assert [row["passed"] for row in rows] == [True, False, False]
    assert rows[1]["error"] == 0.5 and rows[2]["error"] is None
    assert "division" in rows[2]["complaint"]
    assert "DISAGREES" in CliRunner().invoke(app, ["check"]).stdout


def test_without_a_gpu_there_is_nothing_to_hold_against_a_reference():
    result = CliRunner().invoke(app, ["check"])
    assert result.exit_code == 0 and (backend.has_gpu() or "no GPU" in result.output)
