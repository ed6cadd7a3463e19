"""Targets of bits per weight and of gigabytes: layers differ, and each bit counts."""

import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import CONFIG, job, random_network, write_folder, write_telling
from mlx_lm.utils import load as stock_load
from test_quantize import quantise

import mlxquant
from mlxquant.base.errors import BadCheckpoint, BadValue, MlxquantError
from mlxquant.model.inspection import inspect
from mlxquant.model.loading import open_lazily
from mlxquant.quantise import assignment, ends
from mlxquant.quantise.budget import choose
from mlxquant.quantise.job import Target


@pytest.mark.parametrize("target,size", [
    (Target(bits_per_weight=3.5), lambda r: r.bits_per_weight / 3.5),
    (Target(gigabytes=0.0001), lambda r: r.file_bytes / 1e5),
])
def test_a_target_is_met_and_layers_differ(tmp_path, tiny_folder, text, target, size):
    quantise(tiny_folder, tmp_path / "out", text, target=target,
             rules=(("*.0.mlp.down_proj", {"bits": 6}),))
    result = inspect(str(tmp_path / "out"))
    assert 0.9 < size(result) <= 1
    bits = {layer.path: layer.bits for layer in result.layers if "layers" in layer.path}
    assert bits["model.layers.0.mlp.down_proj"] == 6 and len(set(bits.values())) > 1
    stock_load(str(tmp_path / "out"))


@pytest.mark.parametrize("options", [
    dict(method="replica", rotation="online"), dict(method="gptq", rotation="online"),
    dict(method="replica", replica_group=32, rules=(("*.down_proj", {"bits": 4}),))])
def test_a_target_counts_what_is_stored_to_the_bit(tmp_path, tiny_folder, text, options,
                                                   monkeypatch):
    """Siblings that are stored alike share their input's scales, others do not: both occur here.
    In groups of 32, few replicas can be stored."""
    taken = []
    monkeypatch.setattr(assignment, "choose",
                        lambda *given: taken.append(choose(*given)) or taken[-1])
    quantise(tiny_folder, tmp_path / "out", text, target=Target(bits_per_weight=4.3), refine=0,
             **options)
    result, (chosen,) = inspect(str(tmp_path / "out")), taken
    weights = 2 * (64 * (128 + 2 * 64) + 128 * 64 + 3 * 64 * 128)
    assert (result.bits_per_weight
            == pytest.approx(sum(option.bits for option in chosen.values()) / weights, rel=1e-12))
    if options["method"] == "replica" and "rules" not in options:
        kinds = {len(set(option.choice)) for paths, option in chosen.items() if "," in paths}
        assert 1 in kinds and len(kinds) > 1
        assert mlxquant.generate(mlxquant.load(str(tmp_path / "out")), "the cat", max_tokens=2).text
        quantise(tiny_folder, tmp_path / "alike", text, target=Target(4.3, alike=True), refine=0,
                 **options)
        assert all(len(set(option.choice)) == 1 for option in taken[1].values())
        assert inspect(str(tmp_path / "alike")).bits_per_weight <= 4.3


def test_what_a_rule_stores_in_groups_stands_beside_rotated_replicas(tmp_path, tiny_folder, text):
    """The budget leaves it as it is, and both ways of loading agree."""
    rule = {"method": "gptq", "bits": 8, "group_size": 64, "rotation": None}
    quantise(tiny_folder, tmp_path / "out", text, target=Target(bits_per_weight=3.5), refine=0,
             method="replica", rotation="online", rules=(("*v_proj", rule),))
    formats = {layer.path.rpartition(".")[2]: layer.format
               for layer in inspect(str(tmp_path / "out")).layers if "self_attn" in layer.path}
    assert formats["v_proj"] == "affine g64" and "rotated" in formats["q_proj"]
    packed, dense = (mlxquant.load(str(tmp_path / "out"), dense=dense) for dense in (False, True))
    logits, wanted = (model.network(mx.array([[3, 17, 29]])) for model in (packed, dense))
    assert mx.abs(logits - wanted).max() < 1e-3 * mx.abs(wanted).max()


def test_a_rule_that_asks_for_no_more_than_the_job_does_fixes_no_siblings(tmp_path, tiny_folder,
                                                                          text):
    """q is the first that is called of its siblings, up is not."""
    quantise(tiny_folder, tmp_path / "out", text, target=Target(bits_per_weight=3.6), refine=0,
             method="replica", rules=(("*.q_proj", {"bits": 4}), ("*.up_proj", {"bits": 4})))
    result = inspect(str(tmp_path / "out"))
    assert result.bits_per_weight <= 3.6
    assert all((layer.bits == 4) == layer.path.endswith(("q_proj", "up_proj"))
               for layer in result.layers if ".layers." in layer.path)


def test_what_was_weighed_for_other_bits_is_not_taken_for_a_ruled_layer(tmp_path, tiny_folder,
                                                                        text):
    rules = (("*.down_proj", {"group_size": 32}),)
    for bits in (2, 4):
        quantise(tiny_folder, tmp_path / f"{bits}", text, target=Target(bits_per_weight=3.7),
                 rules=rules, method="rtn", bits=bits)
        assert inspect(str(tmp_path / f"{bits}")).bits_per_weight <= 3.7


def test_a_target_out_of_reach_names_the_least(tmp_path, tiny_folder, text):
    with pytest.raises(BadValue, match="at least 2.5 bits per weight"):
        quantise(tiny_folder, tmp_path / "out", text, target=Target(bits_per_weight=1.5))
    with pytest.raises(BadValue, match="at least 6.*e-05 GB, 3"):
        quantise(tiny_folder, tmp_path / "out", text, target=Target(gigabytes=0.00005))
    with pytest.raises(BadValue, match="one positive number"):
        Target(bits_per_weight=3, gigabytes=1)


@pytest.fixture(scope="module")
def telling(tmp_path_factory):
    """A model with a head of its own that predicts something."""
    folder = tmp_path_factory.mktemp("telling")
    return write_telling(folder, CONFIG | {"tie_word_embeddings": False}) / "source"


def test_narrow_embeddings_and_heads_cost_what_the_predictions_lose(telling):
    tokens = np.random.default_rng(0).integers(0, 100, (4, 16))
    found = dict(ends.divergences(telling, tokens))
    assert list(found) == list(ends.WIDTHS) and list(found.values()) == sorted(found.values())[::-1]
    network, _ = open_lazily(telling)
    network.set_dtype(mx.float32)
    right = nn.log_softmax(network(mx.array(tokens)))
    nn.quantize(network, 64, 4, class_predicate=lambda path, module: "layers" not in path
                and hasattr(module, "to_quantized"))
    wrong = nn.log_softmax(network(mx.array(tokens)))
    lost = (mx.exp(right) * (right - wrong)).sum(-1).mean().item()
    assert found[4] == pytest.approx(lost, rel=0.1)  # the ranges of groups are found otherwise


def test_a_folders_size_is_spent_on_embedding_and_head_too(tmp_path, telling, text):
    def width_of(gigabytes, **options):
        folder = tmp_path / f"{gigabytes}{options}"
        notes = quantise(telling, folder, text, target=Target(gigabytes=gigabytes), **options).notes
        made = inspect(str(folder))
        assert made.file_bytes <= 1e9 * gigabytes
        (width,) = {layer.bits for layer in made.layers if "layers" not in layer.path}
        assert (f"embedding and head have {width} bits" in str(notes)) == (
            width < 32 and not options)
        return width

    assert width_of(0.0001) < 8
    with pytest.raises(BadValue, match="7.8.*e-05 of them outside the body"):
        width_of(0.0001, embedding_bits=8)
    assert width_of(0.00012, embedding_bits=5) == 5
    assert width_of(1) == 32  # as they are, where there is room


def test_what_nothing_is_gained_by_stays_as_it_is(tmp_path, telling, text, monkeypatch):
    """Some networks are one block, with embedding and head in it."""
    monkeypatch.setattr(ends, "divergences", lambda *_: [(bits, 0.0) for bits in ends.WIDTHS])
    made = quantise(telling, tmp_path / "out", text, target=Target(gigabytes=1))
    assert not made.notes
    assert inspect(str(tmp_path / "out")).layers[0].bits == 32


def test_another_jobs_unfinished_work_is_refused_before_layers_are_weighed(tmp_path, telling, text,
                                                                           monkeypatch):
    unfinished = tmp_path / "out.partial" / "job.json"
    unfinished.parent.mkdir()
    unfinished.write_text('{"job": "another", "asked": "another"}')
    monkeypatch.setattr("mlxquant.quantise.pipeline.assign", lambda *_: pytest.fail("weighed"))
    with pytest.raises(MlxquantError, match="unfinished work of another job"):
        quantise(telling, tmp_path / "out", text, target=Target(gigabytes=1))


def test_a_killed_weighing_goes_on_at_the_block_it_was_in(tmp_path, tiny_folder, text, monkeypatch):
    weighed, own = [], assignment.Trial.results
    monkeypatch.setattr(assignment.Trial, "results", lambda trial, *rest: (
        weighed.append(trial.block.path), own(trial, *rest))[1])
    options = {"target": Target(bits_per_weight=4.5), "refine": 0}
    quantise(tiny_folder, tmp_path / "whole", text, **options)
    once, weighed[:] = list(weighed), []
    monkeypatch.setattr(assignment, "cache_dir", (tmp_path / "cache").joinpath)

    def kill(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantise(tiny_folder, tmp_path / "out", text, progress=kill, **options)
    quantise(tiny_folder, tmp_path / "out", text, **options)
    assert weighed == once and len(set(weighed)) == 2
    assert ((tmp_path / "out" / "model.safetensors").read_bytes()
            == (tmp_path / "whole" / "model.safetensors").read_bytes())


def test_a_model_replaced_while_its_layers_are_weighed_is_not_mixed(tmp_path, text):
    source, other = (write_folder(tmp_path / name, random_network(seed=seed))
                     for seed, name in enumerate(("model", "other")))
    stages = []

    def replace(done, total, seconds, stage):
        stages.append(stage)
        shutil.copy(other / "model.safetensors", source / "model.safetensors")

    with pytest.raises(BadCheckpoint, match="model changed while it was read; nothing was written"):
        mlxquant.quantize(str(source), tmp_path / "out", job(text, target=Target(4.5)),
                          progress=replace)
    assert stages == ["weighing"] and {p.name for p in tmp_path.iterdir()} == {"model", "other"}
