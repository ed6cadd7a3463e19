"""The operations of ``lanes.replicated`` are those of the kernel as a compiler makes it."""

import re
from collections import Counter

import mlx.core as mx
import pytest

from mlxquant.codes.spec import MOST_REPLICAS, REPLICA_GROUPS, ReplicaShape
from mlxquant.codes.width import Width
from mlxquant.kernels import replicated_matvec
from mlxquant.kernels.cases import Case
from mlxquant.machine import chips
from mlxquant.report import lanes

_INSTRUCTION = re.compile(r"\s+(?:%\S+ = )?(\w+) ")


class Seen(Exception):
    """The source of a call was taken; nothing is to run."""


@pytest.fixture
def emulation(emulate, monkeypatch):
    made = emulate(alignment=16)
    made.install(monkeypatch, replicated_matvec)
    return made


def counted(emulation, monkeypatch, case: Case) -> Counter:
    """Instructions per weight of the loop over a row, the largest block without a branch."""
    sources = []

    def take(source):
        sources.append(source)
        raise Seen

    _, matrix = case.draw()
    monkeypatch.setattr(emulation.compiler, "build", take)
    with pytest.raises(Seen):
        replicated_matvec.multiply(mx.zeros(8), matrix, case.tokens, case.dtype)
    blocks = re.split(r"\n\S+:", emulation.compiler.llvm(sources[0]))
    found = Counter(match[1] for line in max(blocks, key=len).splitlines()
                    if (match := _INSTRUCTION.match(line)))
    weights = 32 * replicated_matvec.rows_together(case.shape, case.tokens)
    return Counter({name: count / weights for name, count in found.items()})


@pytest.mark.parametrize("bits, replicas, group", [
    (1, 4, 16), (2, 1, 0), (2, 4, 0), (2, 8, 16), (3, 2, 0), (4, 4, 16)])
def test_a_weight_costs_what_the_model_says(emulation, monkeypatch, bits, replicas, group):
    case = Case(Width.of(bits), replicas, group, 64, 8, 64, 1, mx.float16)
    found = counted(emulation, monkeypatch, case)
    floating = max(found["fmul"], found["fadd"]) + found["fsub"]  # a sum of products is one
    integer = sum(found[name] for name in ("and", "or", "xor", "add", "sub"))
    integer += 4 * sum(found[name] for name in ("lshr", "ashr", "shl", "mul"))
    said = lanes.replicated(bits, replicas, group)
    assert floating == pytest.approx(said.operations, rel=0.02)
    assert integer == pytest.approx(said.integer, rel=0.1)
    # A half is read as a float by the operation that uses it: no operation of its own.
    assert not {"uitofp", "sitofp", "zext"} & {name for name, count in found.items() if count > 0.1}


@pytest.mark.parametrize("group", REPLICA_GROUPS)
def test_as_many_rows_share_a_fetch_as_in_the_kernel(group):
    for replicas in range(1, MOST_REPLICAS + 1):
        rows = replicated_matvec.rows_together(ReplicaShape(2, replicas, group), 1)
        assert lanes.replicated(2, replicas, group).fetched == pytest.approx(4 / rows * (
            1 + (1 + replicas) / min(group, 32) if group else replicas * 33 / 32))


@pytest.mark.parametrize("tokens", [2, 4, 8])
def test_plain_replicas_of_several_tokens_are_folded(emulation, monkeypatch, tokens):
    case = Case(Width.TWO, 4, 0, 64, 8, 64, tokens, mx.float16)
    assert counted(emulation, monkeypatch, case)["fmul"] == pytest.approx(4 + 1 + tokens)


def test_the_model_foretells_what_replicas_cost_an_h100():
    """Its ordinary cores do everything in turn, and read a half as a float by an operation."""
    measured = {(4, 16): 8.39, (8, 16): 9.53, (4, 0): 15.62}  # µs; results/kernel-candidates.json

    def operations(replicas: int, group: int) -> float:
        cost = lanes.replicated(2, replicas, group)
        return 1 + cost.integer + cost.on(chips.find("M4 Pro"))

    for shape, microseconds in measured.items():
        assert operations(*shape) / operations(1, 0) == pytest.approx(microseconds / 7.48, rel=0.06)
