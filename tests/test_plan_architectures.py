"""Plans of mixtures and hybrids against counts by hand, and of every architecture of mlx-lm."""

import json
from pathlib import Path

import pytest
from architectures import CONFIGURATIONS, FEW, REFUSED, network_of, slow_unless
from conftest import job

from mlxquant import MlxquantError
from mlxquant.base.errors import Unsupported
from mlxquant.layers import outline, traffic
from mlxquant.layers.blocks import held_bytes
from mlxquant.machine import chips
from mlxquant.quantise.rehearsal import planned
from mlxquant.report import plan


def published(name):
    """A config.json as its publisher has it, copied by hand."""
    return json.loads((Path(__file__).parent / "data/configs" / f"{name}.json").read_text())


# By layer: attention, router, one expert, what all tokens share; and the embedding.
QWEN3_MOE = (2048 * (4096 + 2 * 512) + 4096 * 2048, 2048 * 128, 3 * 2048 * 768, 0, 151936 * 2048)
GPT_OSS = (2880 * (4096 + 2 * 512) + 4096 * 2880, 2880 * 32, 3 * 2880 * 2880, 0, 201088 * 2880)
LINEAR = 2048 * (2 * 2048 + 2 * 4096 + 2 * 32) + 8192 * 4 + 4096 * 2048  # of Qwen3-Next: 3 in 4
FULL = 2048 * (2 * 4096 + 2 * 512) + 4096 * 2048
QWEN3_NEXT = ((3 * LINEAR + FULL) / 4, 2048 * 512, 3 * 2048 * 512, 3 * 2048 * 512 + 2048,
              151936 * 2048)


@pytest.mark.parametrize("name, by_hand, layers, experts, chosen, total, active", [
    ("qwen3-30b-a3b", QWEN3_MOE, 48, 128, 8, 30.5e9, 3.35e9),
    ("gpt-oss-20b", GPT_OSS, 24, 32, 4, 20.9e9, 4.19e9),  # 3.6e9 and the embedding, looked up
    ("qwen3-next-80b-a3b", QWEN3_NEXT, 48, 512, 10, 79.7e9, 3.87e9)])
def test_mixtures_and_hybrids_are_planned_from_their_configurations(
        monkeypatch, name, by_hand, layers, experts, chosen, total, active):
    monkeypatch.setattr(plan, "AFFINE", ((4, 64),))
    monkeypatch.setattr(plan, "REPLICATED", ((2, 4, 0),))
    attention, router, expert, shared, embedding = by_hand
    found = plan.plan(name, config=published(name), chip="M4 Max", context=8192)
    once = layers * (attention + router + shared) + 2 * embedding
    assert found.parameters == pytest.approx(once + layers * experts * expert, rel=1e-4)
    assert found.active_parameters == pytest.approx(once + layers * chosen * expert, rel=1e-4)
    assert found.parameters == pytest.approx(total, rel=2e-3)
    assert found.active_parameters == pytest.approx(active, rel=2e-3)
    rows = {row.method: row for row in found.rows if row.kv_bits == 16}
    assert {"original", "affine", "replicas"} <= set(rows) and len(found.remarks) == 1
    assert rows["original"].file_bytes == pytest.approx(2 * found.parameters, rel=1e-3)
    assert rows["affine"].tps > 1.5 * rows["original"].tps
    assert rows["affine"].bytes_per_token < rows["original"].bytes_per_token / 2


def test_of_a_mixture_the_chosen_experts_alone_are_read():
    """Qwen3-30B-A3B in 4 bits by hand: its router and the head are kept in 8 bits."""
    config = published("qwen3-30b-a3b")
    network = planned(outline.network_of(config), config,
                      job(method="rtn", bits=4, embedding_bits=8))
    attention, router, expert, _, embedding = QWEN3_MOE
    norms = 2 * (48 * (2 * 2048 + 2 * 128) + 2048)
    bits = 48 * ((attention + 8 * expert) * 4.5 + router * 8.5) + (embedding + 2048) * 8.5
    assert traffic.weight_bytes(network) == bits / 8 + norms
    held = 48 * ((attention + 128 * expert) * 4.5 + router * 8.5) + 2 * embedding * 8.5
    assert held_bytes(network) == held / 8 + norms


def test_the_form_that_openai_publishes_is_known():
    """Experts in mxfp4, 4.25 bits, and all else in 16: 13.76 GB (12.8 GiB)."""
    attention, router, expert, _, embedding = GPT_OSS
    network = outline.network_of(published("gpt-oss-20b"))
    biases = 24 * 32 * 3 * 2880
    wide = 24 * (attention + router) + 2 * embedding + biases
    bits = 24 * 32 * expert * 4.25 + wide * 16
    assert held_bytes(network) == pytest.approx(bits / 8, rel=1e-3)
    assert held_bytes(network) == pytest.approx(13.76e9, rel=1e-3)


@pytest.mark.parametrize("name, offered", [
    ("llama", [16, 8, 4]), ("qwen3_next", [16, 8, 4]), ("gpt_oss", [16]), ("olmo3", [16]),
    ("deepseek_v3", [16]), ("mamba", [16])])
def test_only_keys_and_values_that_the_model_takes_are_offered(monkeypatch, name, offered):
    monkeypatch.setattr(plan, "AFFINE", ())
    monkeypatch.setattr(plan, "REPLICATED", ())
    rows = plan.plan("x", config=CONFIGURATIONS[name], chip="M1", context=64).rows
    assert [row.kv_bits for row in rows] == offered
    for bits in {8, 4} - set(offered):
        with pytest.raises(Unsupported, match="leave kv_bits out"):
            outline.token_cache(network_of(name), bits, computed=True)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=slow_unless(name in FEW or name in REFUSED))
    for name in CONFIGURATIONS])
def test_every_architecture_is_planned_for(monkeypatch, name):
    monkeypatch.setattr(plan, "AFFINE", ((4, 64),))
    monkeypatch.setattr(plan, "REPLICATED", ((2, 2, 0),))
    config = CONFIGURATIONS[name]
    if name in REFUSED:  # it has one form, and no original to plan from
        with pytest.raises(MlxquantError, match="Hadamard packs require 2-bit"):
            plan.plan("x", config=config, chip="M1", context=64)
        return
    found = plan.plan("x", config=config, chip="M1", context=64)
    assert {row.method for row in found.rows} == {"original", "affine", "replicas"}
    assert 0 < found.active_parameters <= found.parameters
    assert plan.predict_model(config, chips.find("M1")).tps > 0
