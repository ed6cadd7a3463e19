"""Every model type that mlx-lm has can be quantised, or is refused with its reason."""

from pathlib import Path

import pytest
from architectures import CONFIGURATIONS, FEW, METHODS, REFUSED, attempt, slow_unless, write
from conftest import job

import mlxquant
from mlxquant import MlxquantError
from mlxquant.layers.traffic import body_bits
from mlxquant.model.loading import open_lazily
from mlxquant.quantise import assignment
from mlxquant.quantise.budget import choose
from mlxquant.quantise.job import Target

# Replicas need GPTQ's statistics and sweep too: it runs itself on a mixture, on shared caches, on
# recurrent states and on blocks that are called in parts.
GPTQ = ("qwen3_moe", "gemma4", "mamba", "falcon_h1", "iquestloopcoder")
REPLICA = set(FEW) - {"qwen3_moe", "gpt_oss"}  # test_experts.py chats with those two
QUICK = {"rtn": FEW, "gptq": GPTQ, "awq": (), "replica": REPLICA}
ROWS = [pytest.param(name, method, marks=slow_unless(name in QUICK[method]))
        for name in CONFIGURATIONS if name not in REFUSED for method in METHODS]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return path


@pytest.mark.parametrize("name,method", ROWS)
def test_each_method_makes_a_model_that_runs_as_it_was_made(name, method, tmp_path, text):
    made = attempt(write(name, tmp_path / "source"), method, tmp_path / "made", text)
    assert made.from_dense < 1e-4, f"packed and dense weights differ: {made}"
    assert made.from_source < (0.05 if method != "replica" else 2), made


def test_a_budget_leaves_what_the_architecture_keeps(tmp_path, text):
    source, keeping = write("granite", tmp_path / "source"), ("o_proj", "down_proj")
    mlxquant.quantize(str(source), tmp_path / "made", job(
        text, samples=2, length=32, target=Target(bits_per_weight=4), **METHODS["replica"]))
    made = mlxquant.inspect(str(tmp_path / "made"))
    assert made.bits_per_weight <= 4
    layers = [layer for layer in made.layers if ".layers." in layer.path]
    assert {layer.bits for layer in layers if layer.path.endswith(keeping)} == {8}
    assert all("replicas" in layer.format for layer in layers if not layer.path.endswith(keeping))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_made_is_refused_before_any_work(name, tmp_path, text):
    source = write(name, tmp_path / "source")
    for method in METHODS:
        with pytest.raises(MlxquantError) as refused:
            attempt(source, method, tmp_path / method, text)
        assert "\n" not in str(refused.value)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("name,rules", [
    ("afm7", ()), ("mamba2", ()), ("deepseek_v3", ()),
    ("starcoder2", (("*.c_fc", {"method": "awq", "bits": 4}),))])
def test_a_budget_counts_what_it_does_not_choose(name, rules, tmp_path, text, monkeypatch):
    """Matrices that stay as they are, convolutions, matrices by head, and inputs' scales."""
    taken = []
    monkeypatch.setattr(assignment, "choose", lambda *given: taken.append(
        (given[1], choose(*given))) or taken[-1][1])
    mlxquant.quantize(str(write(name, tmp_path / "source")), tmp_path / "made", job(
        text, samples=2, length=32, target=Target(4.5), rules=rules, **METHODS["rtn"]))
    bits, weights = body_bits(open_lazily(tmp_path / "made")[0])
    ((budget, chosen),) = taken
    assert bits <= 4.5 * weights
    assert 4.5 * weights - bits == budget - sum(option.bits for option in chosen.values())


def test_a_folders_size_counts_biases(tmp_path, text, monkeypatch):
    monkeypatch.setitem(CONFIGURATIONS, "wide", CONFIGURATIONS["starcoder2"] | {
        "hidden_size": 32, "intermediate_size": 4096, "num_hidden_layers": 1})
    taken = []
    monkeypatch.setattr(assignment, "choose", lambda *given: taken.append(
        (given[1], choose(*given))) or taken[-1][1])
    mlxquant.quantize(str(write("wide", tmp_path / "source")), tmp_path / "made", job(
        text, samples=2, length=32, embedding_bits=8, target=Target(gigabytes=1),
        **METHODS["rtn"]))
    ((budget, chosen),) = taken
    beside = mlxquant.inspect(str(tmp_path / "made")).file_bytes - sum(
        option.bits for option in chosen.values()) / 8
    assert beside <= 1e9 - budget / 8


@pytest.mark.parametrize("name,reason", [("iquestloopcoder", "not called one by one"),
                                         ("deepseek_v41", "VJP with respect to indices")])
def test_a_budget_without_gradients_is_refused_before_any_work(name, reason, tmp_path, text):
    source = write(name, tmp_path / "source")
    with pytest.raises(MlxquantError, match=f"{name} takes no target: .*{reason}"):
        mlxquant.quantize(str(source), tmp_path / "made", job(text, target=Target(4)))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_budget_whose_gradients_are_not_finite_is_refused(tmp_path, text):
    source = write("rwkv7", tmp_path / "source")  # the tiny one divides by a norm of zero
    with pytest.raises(MlxquantError, match=r"gradient at model\.layers\..* is not finite"):
        mlxquant.quantize(str(source), tmp_path / "made", job(
            text, samples=2, length=32, target=Target(2.5), **METHODS["replica"]))


def test_the_page_of_models_names_every_type():
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    listed = {line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")}
    assert set(CONFIGURATIONS) <= listed
