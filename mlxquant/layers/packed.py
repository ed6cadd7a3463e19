"""Replicated layers as a GPU runs them: siblings stacked into one matrix, codes in the kernels' order.

``pack`` puts them in the place of the stored form when a model is loaded. One token then costs a group (q, k, v; o;
gate, up; down) two dispatches: its input is prepared once, its codes are read in one call. What a block does to that
input before, an RMSNorm or SwiGLU, goes into the first of them (``kernels/first_step.py``). Few tokens take the same
kernels; a longer prompt expands the codes once and multiplies. A kernel that disagrees with its reference on this
machine (``kernels/check.py``) is not used; ``mx`` operations are, which are right everywhere.

To call a kernel takes Python some ten microseconds, of which a token has hundreds: for few tokens a group, and a
whole MLP, is traced once by ``mx.compile`` and replayed.
"""

import itertools

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxquant.kernels import (
    backend,
    code_order,
    expand_codes,
    prepare_input,
    replicated_matvec,
    replicated_tensor_cores,
)
from mlxquant.kernels.check import trusted
from mlxquant.kernels.first_step import AS_IS, Gate, Norm
from mlxquant.kernels.prepare_input import Scales
from mlxquant.layers.graph import gates_by_swiglu, norm_before
from mlxquant.layers.replicated import MadeOnce, ReplicaInput, ReplicatedLinear

FEW_TOKENS = 8  # more are a prompt: expanding the codes once is cheaper (benchmarks/LOG.md)


def _is_few(x: mx.array) -> bool:
    """Whether x (…, n) holds so few tokens that kernels take them."""
    return x.size <= FEW_TOKENS * x.shape[-1]


class PackedGroup(nn.Module):
    """Siblings of n inputs and, stacked, m outputs: ``codes`` (m, chunks, b) in the kernels' order,
    ``replica_out`` (m, K), and what ``ReplicaInput`` holds, in float32. ``first`` is done to what it is called with
    before anything else: x is (…, n), or (…, 2 n) where ``first`` is a gate."""

    def __init__(self, shared: ReplicaInput, linears: list[ReplicatedLinear]):
        super().__init__()
        spec = shared.spec
        self.inputs, self.spec, self.first = shared.inputs, spec, AS_IS
        parts = [code_order.reorder(linear.codes, spec.bits, shared.inputs) for linear in linears]
        self.codes = mx.concatenate(parts) if len(parts) > 1 else parts[0]
        self._ends = tuple(itertools.accumulate(map(len, parts)))[:-1]  # of siblings' rows; no list: that would be a child
        self.replica_out = mx.concatenate([linear.replica_out for linear in linears])
        scales = Scales.of(self.inputs, spec.replicas, spec.replica_group, spec.rotation_block, shared.replica_in,
                           shared.get("column_scale"), shared.get("rotation_signs"))
        self.replica_in, self.column_scale, self.rotation_signs = (
            scales.replica_in, scales.column_scale, scales.signs)
        self._made, self._few = MadeOnce(), mx.compile(self._multiply)
        self.freeze()

    @property
    def weight_count(self) -> int:
        return len(self.codes) * self.inputs

    @property
    def siblings(self) -> int:
        return len(self._ends) + 1

    def operations(self) -> int:
        """Multiply-adds per token that the definition takes: K per weight, grouped 1 + K / G, and the rotation's."""
        return self.spec.multiply_adds(self.weight_count) + self.spec.rotation_additions(self.inputs)

    def outputs(self, x: mx.array, reader: nn.Module) -> list[mx.array]:
        """Each sibling's output (…, rows) of ``x``, in its dtype (with a norm, the one a norm gives); made once for
        the siblings that hand in the same array."""
        return self._made.get(x, reader, self._few if _is_few(x) else self._multiply)

    def stacked(self, x: mx.array) -> mx.array:
        """All siblings' outputs (…, m) of ``x``, one behind the other."""
        flat = x.reshape(-1, x.shape[-1])
        y = self._by_kernel(flat) if _is_few(flat) else self._by_product(self.first(flat))
        return y.reshape(*x.shape[:-1], -1)

    def _multiply(self, x: mx.array) -> list[mx.array]:
        return mx.split(self.stacked(x), list(self._ends), axis=-1)

    def _by_kernel(self, x: mx.array) -> mx.array:
        scales, levels, first = self._scales(), self.spec.bits.levels, self.first
        dtype = first.dtype(x)
        if not trusted(first.kernel):
            x, first = first(x), AS_IS
        if (not trusted("prepare_input") or scales.rotation > prepare_input.LARGEST_BLOCK
                or self.codes.size < backend.SMALLEST):
            return self._reference(first(x))
        kernel, layout = replicated_matvec, replicated_matvec.layout(scales.group)
        if replicated_tensor_cores.fits(scales, len(x), dtype) and trusted("replicated_tensor_cores"):
            kernel, layout = replicated_tensor_cores, replicated_tensor_cores.layout(self.codes.shape[-1], dtype)
        elif not trusted("replicated_matvec"):
            return self._reference(first(x))
        prepared = prepare_input.prepare(x, scales, layout, first)
        return kernel.multiply(prepared, self.codes, self.replica_out, scales, levels, len(x), dtype)

    def _by_product(self, x: mx.array) -> mx.array:
        if not trusted("expand_codes"):
            return self._reference(x)
        scales = self._scales()
        weight = expand_codes.expand(self.codes, self.replica_out, scales, self.spec.bits.levels, x.dtype)
        return prepare_input.rotated(x, scales).astype(x.dtype) @ weight.T

    def _reference(self, x: mx.array) -> mx.array:
        scales = self._scales()
        return replicated_matvec.reference(prepare_input.rotated(x, scales), self.codes, self.replica_out, scales,
                                           self.spec.bits.levels, x.dtype)

    def _scales(self) -> Scales:
        spec = self.spec
        return Scales(self.inputs, spec.replicas, spec.replica_group, spec.rotation_block,
                      self.replica_in, self.column_scale, self.rotation_signs)


class PackedLinear(nn.Module):
    """The sibling of number ``index`` in what its group computes, plus its ``bias``."""

    def __init__(self, group: PackedGroup, index: int, bias: mx.array | None):
        super().__init__()
        object.__setattr__(self, "_group", group)  # past Module: its parameters are those of the group alone
        self.index = index
        if bias is not None:
            self.bias = bias
        self.freeze()

    @property
    def group(self) -> PackedGroup:
        return self._group

    def __call__(self, x: mx.array) -> mx.array:
        y = self._group.outputs(x, self)[self.index]
        return y + self.bias.astype(y.dtype) if "bias" in self else y


class NormDoneByReader(nn.Module):
    """In the place of an RMSNorm whose only reader does it: hands x on. It keeps the weight where it was, by its path
    and in all counts."""

    def __init__(self, norm: nn.RMSNorm):
        super().__init__()
        self.weight = norm.weight
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        return x


class PackedMLP(nn.Module):
    """down(silu(gate x) ∘ up x), where gate and up are one group and nothing runs between it and down's.

    ``down_proj`` holds down's bias, if there is one.
    """

    def __init__(self, gate_up: PackedGroup, down_proj: PackedLinear):
        super().__init__()
        self.gate_up, self.down, self.down_proj = gate_up, down_proj.group, down_proj
        self.down.first = Gate()
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self.gate_up.stacked(x))


class TracedForFew(nn.Module):
    """``module``, a function of x (…, n) alone, traced once for each number of tokens up to ``FEW_TOKENS``."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self._few = module, mx.compile(module.__call__)  # the module itself would count twice
        self.freeze()

    def __call__(self, x: mx.array) -> mx.array:
        return (self._few if _is_few(x) else self.module)(x)


def pack(network: nn.Module) -> nn.Module:
    """Put the packed form in the place of every replicated layer, in place, one group after the other, so that
    the stored codes of one group at most are held beside the packed ones."""
    modules = dict(network.named_modules())
    model_type = getattr(network, "model_type", "")
    for path, shared in modules.items():
        if not isinstance(shared, ReplicaInput):
            continue
        linears = {p: m for p, m in sorted(modules.items())  # gate before up
                   if isinstance(m, ReplicatedLinear) and m.input is shared}
        group = PackedGroup(shared, list(linears.values()))
        mx.eval(group.parameters())
        made = [(path, group)]
        for index, (below, linear) in enumerate(linears.items()):
            made.append((below, PackedLinear(group, index, linear.get("bias"))))
            modules[below] = None  # lets go of its codes
        made += _take_norm(group, modules, list(linears), model_type)
        network.update_modules(tree_unflatten(made))
        mx.clear_cache()
    traced = [(path, TracedForFew(_without_a_step_between(module, model_type)))
              for path, module in network.named_modules()
              if path.endswith(".mlp") and any(isinstance(inner, PackedGroup) for inner in module.modules())]
    network.update_modules(tree_unflatten(traced))
    return network


def _take_norm(group: PackedGroup, modules: dict[str, nn.Module], readers: list[str],
               model_type: str) -> list[tuple[str, nn.Module]]:
    """Have ``group``, the layers at the paths ``readers``, do the norm that feeds it alone; what then takes the
    norm's place, by path, or nothing."""
    above = readers[0].rsplit(".", 2)[0]
    name = norm_before(modules.get(above), [path.removeprefix(f"{above}.") for path in readers], model_type)
    if name is None:
        return []
    norm = modules[f"{above}.{name}"]
    group.first = Norm(norm.weight, norm.eps)
    return [(f"{above}.{name}", NormDoneByReader(norm))]


def _without_a_step_between(mlp: nn.Module, model_type: str) -> nn.Module:
    """``mlp`` as a ``PackedMLP`` where it can be one, else ``mlp`` itself."""
    if not gates_by_swiglu(mlp, model_type):
        return mlp
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    if (not all(isinstance(linear, PackedLinear) for linear in (gate, up, down)) or "bias" in gate or "bias" in up
            or gate.group is not up.group or [gate.index, up.index] != [0, 1] or gate.group.siblings != 2
            or down.group.siblings != 1):
        return mlp
    return PackedMLP(gate.group, down)
