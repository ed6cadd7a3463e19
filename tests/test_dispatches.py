"""How many kernels a token takes: fixed time per token is most of what is lost at low bits."""

import functools
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import make_prompt_cache
from test_fused_block import APART, stock_network
from test_packed import SHAPE, network_of

from mlxquant.kernels import backend, prepare_input, replicated_matvec, rotary
from mlxquant.layers.pack import pack

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from dispatches import launches

FORMS = ("llama", "qwen2", "qwen3", "mistral")


@functools.cache
def blank(shape, dtype):
    """Zeros that are computed already, so that they count nothing."""
    made = mx.zeros(shape, dtype)
    mx.eval(made)
    return made


def standin(shape, dtype, *inputs):
    """One operation that reads ``inputs``: sorting, which no network does."""
    return mx.sort(mx.depends([blank(shape, dtype)], list(inputs))[0])


def kernel(*, inputs, output_shapes, output_dtypes, **_):
    launched = standin((8,), mx.float32, *inputs)
    return mx.depends([blank(*made) for made in zip(output_shapes, output_dtypes)], [launched])


@pytest.fixture
def laid_out(monkeypatch):
    """Graphs as on a GPU, where a kernel, and each of MLX's fast operations, is one node."""
    monkeypatch.setattr(
        "mlxquant.layers.packed.trusted", lambda name: name != "replicated_tensor_cores")
    monkeypatch.setattr(backend.Kernel, "_build", lambda *_: kernel)
    monkeypatch.setattr("mlxquant.layers.fused_block.trusted", lambda name: True)
    for module in (prepare_input, replicated_matvec, rotary):
        monkeypatch.setattr(module._KERNEL, "built", {})
    for name, arrays in (("rms_norm", 2), ("rope", 1), ("scaled_dot_product_attention", 3)):
        monkeypatch.setattr(mx.fast, name, lambda x, *others, _more=arrays - 1, **__: standin(
            x.shape, x.dtype, x, *others[:_more]))


def compilations(monkeypatch):
    """What graphs that are laid out from here on ask MLX to compile, as it tells kernels apart: by
    name and template; and the types of the inputs that each was given."""
    given = {}

    def build(self, mixture):
        def launch(*, template, inputs, **more):
            key = self.name, mixture, *template
            given.setdefault(key, set()).add(tuple(x.dtype for x in inputs))
            return kernel(inputs=inputs, **more)

        return launch

    monkeypatch.setattr(backend.Kernel, "_build", build)
    return given


def token(network):
    """What one token takes after others."""
    network = pack(network)
    cache = make_prompt_cache(network)
    for text in ([7, 7, 7], [7]):
        mx.eval(network(mx.array([text]), cache=cache), network.parameters())
    return launches(network(mx.array([[7]]), cache=cache))


def a_block(make):
    """What one block adds to that, of networks that ``make`` makes with so many blocks."""
    return (token(make(num_hidden_layers=3)) - token(make(num_hidden_layers=2))).total()


@pytest.mark.parametrize("form", FORMS)
def test_a_block_of_packed_layers_takes_ten_kernels_a_token(laid_out, form):
    assert a_block(functools.partial(network_of, form)) <= 10


def test_each_further_way_of_storing_siblings_adds_two_and_gate_and_up_apart_three(laid_out):
    def took(*rules):
        return a_block(functools.partial(network_of, "llama", rules=rules))

    kinds = [(f"*.{name}_proj", {"replicas": i + 1}) for i, name in enumerate("qk")]
    assert [took(*kinds[:more]) for more in range(3)] == [10, 12, 14]
    assert took(*APART) == 10 + 2 + 3  # the copies of gate and up are one node


def test_a_way_of_storing_compiles_one_product_and_replicas_one_preparation(laid_out, monkeypatch):
    """Each compiles for a while when a model is first used: biases, residuals, norms, gates and
    widths, of which a budget takes many, are read at run time."""
    compiled = compilations(monkeypatch)
    ways = {f"*.{name}_proj": {"bits": bits, "replicas": replicas} for name, bits, replicas in (
        ("q", 3, 2), ("o", 4, 2), ("down", 3, 4))}
    token(network_of("qwen2", rules=tuple(ways.items())))
    used = {*((way["bits"], way["replicas"]) for way in ways.values()), (2, SHAPE.replicas)}
    for name, kinds in (("replicated_matvec", used), ("prepare_input", {k for _, k in used})):
        fit = [dict(options) for known, _, *options in compiled if known == name]
        one = [options for options in fit if not options.get("FOLD") and not options.get("BEHIND")
               and options.get("TOKENS", 1) == 1]
        assert len(one) == len(kinds), name


@pytest.mark.parametrize("form", ["qwen2", "qwen3"])
def test_a_compiled_kernel_is_given_one_type_of_each_input(laid_out, monkeypatch, form):
    """MLX looks kernels up by name and template: of two types under one name it would run the
    wrong one, or compile at every call."""
    given = compilations(monkeypatch)
    for dtype in (mx.float32, mx.float16):
        for norms in (mx.float32, mx.float16):
            network = network_of(form, dtype=dtype)
            for module in network.modules():
                if isinstance(module, nn.RMSNorm):
                    module.weight = module.weight.astype(norms)
            token(network)
    assert len(given) > 8 and {len(types) for types in given.values()} == {1}


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("form", FORMS)
def test_a_block_of_mlx_layers_takes_eleven_and_its_biases_one(laid_out, form, bits):
    assert a_block(functools.partial(stock_network, form, bits)) <= 11 + (form == "qwen2")


def test_attention_alone_takes_three_less_and_nothing_fused_fifteen(laid_out, monkeypatch):
    make = functools.partial(network_of, "granite")  # its residuals are scaled
    fused = a_block(make)
    monkeypatch.setattr("mlxquant.layers.pack.read_plain", lambda *_: [])
    assert a_block(make) == fused + 3 and a_block(functools.partial(network_of, "llama")) == 15


def test_whatever_computes_counts_and_views_do_not():
    x = blank((4, 6), mx.float32)
    assert launches(x.T.reshape(-1)[3:][None]).total() == 0
    assert launches(mx.fast.rms_norm(x, None, 1e-5) @ x.T + 1).total() > 3
    assert launches(standin((4,), mx.float32, x.T)) == {"Sort": 1}
