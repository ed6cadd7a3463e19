"""The card that goes with a quantised model: what it says is what the files hold."""

import re

import pytest
from conftest import job

import mlxquant
from mlxquant.quantise import card

SMALL = dict(samples=4, length=32)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("the cat sat on the mat while rain fell and nobody minded it at all. " * 300)
    return str(path)


@pytest.mark.parametrize("options,says", [
    (dict(method="rtn", bits=4), ["rtn, 4 bits, groups of 64", "calibration | none needed |",
                                  "library_name: mlx\n", "plain MLX checkpoint"]),
    (dict(method="replica", bits="ternary", replicas=2, rotation="online", **SMALL),
     ["replica, ternary, 2 replicas, rotated (online)", "library_name: mlxquant\n",
      "mlxquant alone runs it", "4 samples of 32 tokens, words.txt",
      "% of their energy on average"]),
    (dict(method="gptq", bits=3, **SMALL), ["gptq, 3 bits, groups of 64"]),
])
def test_a_card_says_how_the_model_was_made(tiny_folder, tmp_path, text, options, says):
    mlxquant.quantize(str(tiny_folder), tmp_path / "small", job(text=text, **options))
    written = (tmp_path / "small" / "README.md").read_text()
    for expected in [*says, "# small\n", "base_model: tiny\n", "Its licence is not known here"]:
        assert expected in written
    found = mlxquant.inspect(str(tmp_path / "small"))
    assert f"{found.bits_per_weight:.2f} bits per weight" in written
    assert str(tiny_folder) not in written and "None" not in written


def test_a_tuned_model_gets_a_card_of_its_own(tiny_folder, tmp_path, text):
    mlxquant.quantize(str(tiny_folder), tmp_path / "small", job(text=text, bits=2, **SMALL))
    tuned = mlxquant.tune(str(tmp_path / "small"), tmp_path / "tuned", mlxquant.Tuning(
        str(tiny_folder), [text], mlxquant.Schedule(steps=2, batch_size=2, check_every=1), 32))
    written = (tmp_path / "tuned" / "README.md").read_text()
    assert f"{tuned.divergence_before:.4f} → {tuned.divergence_after:.4f} nats" in written
    assert "# tuned\n" in written and "2 steps on words.txt" in written


def test_what_is_known_of_the_base_model(tmp_path):
    recipe = card.base_of("smollm2-135m", tmp_path)
    assert (recipe.title, recipe.licence) == ("SmolLM2-135M-Instruct", "Apache-2.0")
    (tmp_path / "README.md").write_text(
        "---\nlanguage: en\nlicense: mit\n---\n# A model\nlicense: none\n")
    hub = card.base_of("owner/name", tmp_path)
    assert (hub.name, hub.licence) == ("owner/name", "mit")
    assert hub.homepage == "https://huggingface.co/owner/name"
    local = card.base_of(str(tmp_path), tmp_path)
    assert (local.name, local.homepage) == (tmp_path.name, None)
    (tmp_path / "README.md").write_text("no head")
    assert card.base_of(str(tmp_path), tmp_path).licence is None


def test_a_folder_that_says_nothing_of_its_making_gets_no_card(tiny_folder):
    card.write(tiny_folder, "tiny")
    assert not (tiny_folder / "README.md").exists()


def test_the_head_is_yaml_that_the_hub_reads(tiny_folder, tmp_path):
    yaml = pytest.importorskip("yaml")
    mlxquant.quantize(str(tiny_folder), tmp_path / "small", job(method="rtn", bits=4))
    head = re.match(r"---\n(.*?)\n---\n", (tmp_path / "small" / "README.md").read_text(),
                    re.DOTALL)[1]
    assert yaml.safe_load(head) == {"base_model": "tiny", "library_name": "mlx",
                                    "tags": ["mlx", "quantized", "mlxquant"]}
