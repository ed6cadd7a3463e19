"""Experts of a mixture: statistics of their own, replicas that run, nothing left out."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import CONFIGURATIONS, attempt, network_of, write
from conftest import job
from mlx_lm.models.qwen3_moe import Model, ModelArgs

import mlxquant
from mlxquant.layers.blocks import find_blocks
from mlxquant.layers.replicated import ReplicatedSwitchLinear
from mlxquant.layers.transformed import ActivationSpec
from mlxquant.quantise.blocks import quantise_block, restore
from mlxquant.quantise.job import Job
from mlxquant.quantise.observe import LEAN, Routed, Watch
from mlxquant.quantise.plans import noted, plan_blocks
from mlxquant.quantise.settings import Settings


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return path


def test_an_expert_leans_on_all_tokens_as_far_as_its_own_are_few():
    """12 tokens choose 2 of 4 experts each; expert 3 is chosen by none."""
    random = np.random.default_rng(0)
    x = random.normal(size=(12, 8)).astype(np.float32)
    chosen = np.stack([random.permutation(3)[:2] for _ in range(12)])
    routed = Routed.empty(4, 8)
    routed.add(mx.array(x)[:, None, None], mx.array(chosen))
    rows = np.repeat(x, 2, axis=0)
    shared = rows.T @ rows / len(rows)
    for expert in range(4):
        own = x[(chosen == expert).any(1)]
        share = len(own) / (len(own) + LEAN)
        wanted = (1 - share) * shared + (share * own.T @ own / len(own) if len(own) else 0)
        assert routed.each[expert].count == len(own)
        assert np.allclose(routed.of(expert).hessian, wanted, atol=1e-5)
    assert routed.each[3].count == 0 and np.allclose(routed.of(3).hessian, shared, atol=1e-5)


def test_inputs_that_are_sorted_by_expert_give_the_same_statistics():
    random = np.random.default_rng(1)
    x, chosen = random.normal(size=(6, 8)).astype(np.float32), random.integers(0, 3, (6, 2))
    one, other = Routed.empty(3, 8), Routed.empty(3, 8)
    one.add(mx.array(x)[:, None, None], mx.array(chosen))
    order = np.argsort(chosen.ravel())
    other.add(mx.array(x[order // 2])[:, None], mx.array(chosen.ravel()[order]))
    for expert in range(3):
        assert np.allclose(one.of(expert).hessian, other.of(expert).hessian, atol=1e-6)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_a_mixture_of_replicated_experts_chats(name, tmp_path, text):
    source = write(name, tmp_path / "source")
    made = attempt(source, "replica", tmp_path / "made", text)
    assert made.bits_per_weight < 7 and made.from_dense < 1e-4  # tiny: scales weigh much
    model = mlxquant.load(str(tmp_path / "made"), dense=False)
    experts = [m for m in model.network.modules() if isinstance(m, ReplicatedSwitchLinear)]
    assert len(experts) == 3 * 4
    reply = mlxquant.generate(model, [{"role": "user", "content": "Hello"}], max_tokens=4)
    assert reply.report.generation_tokens > 0


def test_experts_that_no_text_reaches_are_made_all_the_same(tmp_path, text):
    """One sample of two tokens cannot reach every expert."""
    source = write("qwen3_moe", tmp_path / "source")
    for method, options in (("gptq", {}), ("replica", {"replicas": 2})):
        asked = job(text, samples=1, length=2, method=method, bits=4, refine=0, **options)
        mlxquant.quantize(str(source), tmp_path / method, asked)
        logits = mlxquant.load(str(tmp_path / method)).network(mx.array([[3, 17, 29]]))
        assert mx.isfinite(logits).all()


@pytest.mark.parametrize("options", [
    dict(method="rtn", group_size=32), dict(method="gptq", group_size=32),
    dict(method="awq", group_size=32), dict(method="replica", replicas=2, rotation="online")],
    ids=lambda options: options["method"])
def test_a_mixture_that_no_text_reaches_is_made_all_the_same(options):
    """Its 96 inputs divide into no group of 64, which replicas do not ask for."""
    network = Model(ModelArgs.from_dict(CONFIGURATIONS["qwen3_moe"]
                                        | {"moe_intermediate_size": 96}))
    blocks = find_blocks(network)
    block, plan = blocks[-1], plan_blocks(network, blocks, Job().changed(bits=4, **options))[-1]
    experts = block.module.mlp.switch_mlp
    before = {name: experts[name].weight for name in ("gate_proj", "down_proj")}
    result = quantise_block(block, plan, Watch(block.module).seen, Settings())
    errors = {path: error for path, error in result.errors.items() if "switch" in path}
    assert len(errors) == 3 and all(0 < error < 0.02 for error in errors.values())
    restore(block.module, result)
    for name, weight in before.items():
        x = mx.random.normal((1, 1, weight.shape[-1]))
        given = experts[name](x, mx.array([[0, 3]]))
        wanted = mx.stack([x[0] @ weight[expert].T for expert in (0, 3)])[None]
        assert mx.square(given - wanted).sum() < 0.03 * mx.square(wanted).sum()


@pytest.mark.parametrize("options, note, group", [
    (dict(activation=ActivationSpec(8)), "inputs not rounded", 64),
    (dict(rotation="online"), "not rotated", 64),
    (dict(method="awq"), "inputs not balanced", 64),
    (dict(group_size=16), "groups of 32, since a stack of matrices takes 32, 64 or 128", 32),
    (dict(group_size=0), "groups of 128, since a stack of matrices takes 32, 64 or 128", 128),
    (dict(method="replica"), None, 64)], ids=str)
def test_what_experts_cannot_take_of_what_is_asked_is_noted_once_for_all_blocks(
        options, note, group):
    network = network_of("qwen3_moe")
    plans = plan_blocks(network, find_blocks(network), Job().changed(**options))
    said = [n for n in noted(plans) if "switch_mlp.gate_proj" in n]
    assert said == ([f"model.layers.*.mlp.switch_mlp.gate_proj, 4 layers: {note}"] if note else [])
    assert plans[0].specs["mlp.switch_mlp.gate_proj"].group_size == group


def test_matrices_by_head_that_are_rounded_to_nearest_are_noted():
    network = network_of("deepseek_v3")
    said = noted(plan_blocks(network, find_blocks(network), Job()))
    assert any("embed_q" in note and ": rounded to nearest" in note for note in said)


def test_tokens_of_two_models_are_paired_only_where_they_are_the_same():
    """Experts in a list are given some tokens; equally many in both models may be others."""
    block = nn.Module()
    block.all, block.steps, block.some, block.more = (nn.Linear(8, 8) for _ in range(4))
    watch, x = Watch(block), mx.random.normal((2, 6, 8))

    def inputs(first):
        return {"all": [(x,)], "steps": [(x[:, token],) for token in range(6)],
                "some": [(x[first, 1:3],)], "more": [(x[0, first:5],)]}

    for other in (1, 0):  # what was once given to others stays unpaired
        watch.take(inputs(0), inputs(other))
    paired = {path for path, found in watch.seen.statistics.items() if found.cross is not None}
    assert paired == {"all", "steps"}
    for path in paired:
        found = watch.seen.statistics[path]
        assert np.allclose(found.cross, found.hessian, atol=1e-5) and found.count == 24
    assert [watch.seen.statistics[path].count for path in ("some", "more")] == [4, 10]


def test_experts_in_a_list_are_made_beside_corrected_layers(tmp_path, text):
    source = write("dbrx", tmp_path / "source")
    mlxquant.quantize(str(source), tmp_path / "made", job(
        text, samples=2, length=16, bits=3, refine=0, propagation="corrected"))
    logits = mlxquant.load(str(tmp_path / "made")).network(mx.array([[3, 17, 29]]))
    assert mx.isfinite(logits).all()
