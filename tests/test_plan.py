"""Plans from configurations alone, and that their sizes are those of what quantize makes."""

import json
import shlex
from dataclasses import asdict, replace

import pytest
from commands import run
from conftest import CONFIG, job, replicated

import mlxquant
from mlxquant import MlxquantError
from mlxquant.base.errors import BadValue
from mlxquant.codes.spec import ReplicaShape
from mlxquant.layers import outline, traffic
from mlxquant.layers.blocks import held_bytes
from mlxquant.layers.replicated import ReplicatedLinear
from mlxquant.machine import chips
from mlxquant.model.loading import open_lazily
from mlxquant.quantise.rehearsal import planned
from mlxquant.report import lanes, plan, quality
from mlxquant.report.host import Host
from mlxquant.sources import checkpoint

LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "vocab_size": 128256, "rope_theta": 500000, "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
QWEN = {
    "model_type": "qwen3", "hidden_size": 5120, "num_hidden_layers": 64, "intermediate_size": 25600,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6,
    "vocab_size": 151936, "rope_theta": 1000000, "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
ROW_KEYS = {"bits", "replicas", "group", "bits_per_weight", "file_bytes", "total_bytes", "fits",
            "tps", "quality", "quality_source"}


@pytest.fixture(scope="module")
def llama():
    return plan.plan("Llama-3.1-8B", config=LLAMA, chip="M1 Pro", memory="16GB")


@pytest.mark.parametrize("config, parameters, kv", [(LLAMA, 8.03e9, 2**30), (QWEN, 32.76e9, 2**31)])
def test_sizes_of_known_models(config, parameters, kv):
    network = outline.network_of(config)
    assert traffic.parameters(network) == pytest.approx(parameters, rel=1e-3)
    assert held_bytes(network) == pytest.approx(2 * parameters, rel=1e-3)
    assert outline.kv_bytes(network, 8192) == kv
    assert outline.kv_bytes(network, 8192, 4) == kv * 5 / 16


def test_the_seed_example():
    found = plan.predict_model(QWEN, chips.find("M1 Pro"))
    assert found.ceiling_tps == pytest.approx(3.1, abs=0.05) and 2.7 < found.tps < 3.1
    assert "does not fit: 32 GB" in found.line()


def test_the_original_is_always_a_row(llama):
    original = [row for row in llama.rows if row.method == "original"]
    assert [row.kv_bits for row in original] == [16, 8, 4] and llama.rows[0] == original[0]
    assert not any(row.fits for row in original) and original[0].quality == 1
    assert original[0].file_bytes == pytest.approx(16.06e9, rel=1e-3)


def test_rows_are_whole_and_consistent(llama):
    assert llama.parameters == pytest.approx(8.03e9, rel=1e-3)
    assert llama.memory_bytes == int(16 * 2**30 * 2 / 3)
    for row in asdict(llama)["rows"]:
        assert set(row) >= ROW_KEYS and row["tps_source"] == "predicted"
        assert row["fits"] == (row["total_bytes"] <= llama.memory_bytes)
        assert row["total_bytes"] > row["file_bytes"] + row["kv_bytes"]
        assert (row["quality"] is None) == (row["quality_source"] is None)
    by_form = {(r.bits, r.replicas, r.group): r for r in llama.rows if r.kv_bits == 16}
    assert by_form[4, None, 64].bits_per_weight == 4.5
    assert 2.01 < by_form[2, 4, 0].bits_per_weight < 2.03
    assert by_form[4, None, 64].tps > by_form[8, None, 64].tps > by_form[16, None, None].tps


def test_the_recommendation_fits_and_its_command_makes_it(llama):
    best = llama.recommended
    assert best.fits and best.quality <= 1.02 and best.bits == 8
    assert best.command == ("mlxquant quantize Llama-3.1-8B -o Llama-3.1-8B-8bit --bits 8 "
                            "--method rtn --group-size 64 --embedding-bits 8")
    assert "not on this model" in best.quality_source


def test_less_memory_or_more_speed_is_paid_in_quality(llama):
    def within(gigabytes):
        return [replace(r, fits=r.total_bytes <= gigabytes * 1e9) for r in llama.rows]

    small = plan.recommend(within(5.7))
    assert small.bits in (3, 4) and small.total_bytes <= 5.7e9
    fast = plan.recommend(llama.rows, min_tps=25)
    assert fast.tps >= 25 and fast.quality > 1.02
    assert plan.recommend(llama.rows, min_tps=1000) is None
    assert plan.recommend(within(1)) is None


def row(**changes):
    values = dict(
        method="affine", bits=4, replicas=None, group=64, kv_bits=16, bits_per_weight=4.5,
        file_bytes=1, kv_bytes=1, scores_bytes=0, total_bytes=10, bytes_per_token=1, fits=True,
        tps=10.0, tps_source="predicted", free_replicas=None, quality=1.1, quality_source="x",
        quality_rank=1, command="c")
    return plan.PlanRow(**values | changes)


def test_what_is_recommended():
    original = row(method="original", bits=16, quality=1.0, quality_rank=None, tps=2.0)
    eight = row(bits=8, quality=1.01, tps=5.0)
    assert plan.recommend([original, eight, row()]) == eight  # as good, and faster
    assert plan.recommend([row(fits=False), row(bits=3, quality=1.5)]).bits == 3
    own, others = row(quality=1.5, quality_rank=0), row(quality=1.05, quality_rank=2)
    assert plan.recommend([own, others]) == own
    assert plan.recommend([row(free_replicas=False), row(bits=2, quality=3.0)]).bits == 2
    assert plan.recommend([row(quality=None, quality_rank=None)]) is None
    assert plan.recommend([original]) == original
    assert plan.recommend([row(kv_bits=8, tps=11.0), row()]).kv_bits == 16


def planned_bytes(tensors):
    """Of a file: a plan has its norms in 16 bits."""
    norms = sum(header.bytes for name, header in tensors.items()
                if "norm" in name and header.dtype == "F32")
    return sum(header.bytes for header in tensors.values()) - norms // 2


FORMS = [dict(method="rtn", bits=4), dict(method="replica", bits=2, replicas=2, rotation="online"),
         dict(method="replica", bits="ternary", replicas=2, replica_group=16, rotation="online")]


@pytest.mark.parametrize("options", FORMS)
def test_sizes_are_those_that_quantize_makes(tiny_folder, tmp_path, options):
    config = checkpoint.read_config(tiny_folder)
    asked = job(embedding_bits=8, samples=2, length=16, **options)
    mlxquant.quantize(str(tiny_folder), tmp_path / "out", asked)
    tensors = checkpoint.validate(tmp_path / "out")
    ours, (made, _) = (planned(outline.network_of(config), config, asked),
                       open_lazily(tmp_path / "out"))
    assert held_bytes(ours) == planned_bytes(tensors)
    assert traffic.body_bits_per_weight(ours) == pytest.approx(traffic.body_bits_per_weight(made))
    replicated = sum(isinstance(m, ReplicatedLinear) for m in ours.modules())
    assert replicated == (14 if "replicas" in options else 0)


def test_a_group_that_most_layers_cannot_take_is_no_form():
    with pytest.raises(BadValue, match="10 of 14 layers"):
        planned(outline.network_of(CONFIG), CONFIG, job(method="rtn", bits=3, group_size=128))
    rows = plan.plan("x", config=CONFIG, chip="M1", context=100).rows
    assert {row.group for row in rows if row.method == "affine"} == {64}


def test_a_stored_form_is_a_row_of_its_own():
    form = {"group_size": 32, "bits": 4, "lm_head": {"group_size": 32, "bits": 8}}
    config = LLAMA | {"num_hidden_layers": 2, "quantization": form}
    found = plan.plan("x", config=config, chip="M4 Max", context=100)
    stored = next(r for r in found.rows if r.method == "as stored")
    assert stored.bits_per_weight == 5.0 and (stored.bits, stored.group) == (4, 32)
    assert outline.network_of(config).lm_head.bits == 8
    assert next(r for r in found.rows if r.method == "original").bits_per_weight == 16


def test_the_recommended_command_makes_what_was_planned(tiny_folder, tmp_path):
    best = plan.plan(str(tiny_folder), chip="M1", context=100).recommended
    program, *arguments = shlex.split(best.command)
    assert program == "mlxquant"
    assert run(*arguments, cwd=tmp_path).returncode == 0
    assert best.file_bytes == planned_bytes(checkpoint.validate(tmp_path / "tiny-8bit"))


def test_every_command_is_one_that_quantize_understands(llama):
    import typer

    from mlxquant import cli

    verb = typer.main.get_command(cli.app).commands["quantize"]
    for command in {r.command for r in llama.rows if r.command}:
        values = verb.make_context("quantize", shlex.split(command)[2:]).params
        assert values["model"] == "Llama-3.1-8B"
        assert values["embedding_bits"] == (8 if values["bits"] in ("8", "6", "5") else 6)


def test_replicas_that_are_stored_already_are_known(tiny_folder, tmp_path):
    mlxquant.quantize(str(tiny_folder), tmp_path / "out",
                      job(method="replica", bits=2, replicas=4, samples=2, length=16))
    config = checkpoint.read_config(tmp_path / "out")
    rows = plan.plan("x", config=config, chip="M4 Max", context=100).rows
    stored = next(row for row in rows if row.method == "as stored")
    assert (stored.bits, stored.replicas, stored.group) == (2, 4, 0) and stored.bits_per_weight < 4
    original = held_bytes(outline.network_of(CONFIG))
    assert plan.predict_model(config, chips.find("M4 Max")).bytes_per_token < original


def test_a_stored_form_is_that_of_most_weights_not_of_the_first():
    rules = (("*layers.0.self_attn.q_proj", {"bits": 4, "replicas": 1}),)
    form, cost = plan._stored(replicated(CONFIG, ReplicaShape(2, 16, 0), rules))
    assert form.label() == "as stored 2 bit, K=16" and cost == lanes.replicated(2, 16)


def test_measured_limits_say_which_replicas_are_free(monkeypatch):
    from mlxquant.machine.replica_limits import ReplicaLimits
    from mlxquant.runtime import probe

    limits = ReplicaLimits(None, {"2": 2}, {"2": {"2": 0, "4": 8, "8": 32, "16": None}})
    monkeypatch.setattr(probe, "replica_limits", lambda: limits)
    config = CONFIG | {"hidden_size": 128, "intermediate_size": 256}
    found = plan.plan("x", config=config, context=100)
    free = {(r.bits, r.replicas, r.group): r.free_replicas for r in found.rows if r.replicas}
    forms = (2, 2, 0), (2, 4, 0), (2, 8, 16), (4, 4, 0)
    assert [free[form] for form in forms] == [True, False, False, None]
    assert {r.tps_source for r in found.rows} == {"ceiling"} and "ceiling" in found.remarks[-1]


def test_what_a_prompt_takes_besides_is_counted():
    """Scores of 64 heads where keys and values are quantised, in steps whose scores take half a
    gigabyte; gate and up of replicas expanded, and three of the widest layer's outputs; the same
    where a chip is asked about one model."""
    config = QWEN | {"num_hidden_layers": 2}
    rows = plan.plan("x", config=config, chip="M1 Pro", context=4096).rows
    rows = {(row.bits, row.replicas, row.kv_bits): row for row in rows}
    for bits, replicas, kv, step, scores, expanded in (
            (16, None, 16, 2048, 0, 0), (16, None, 4, 1024, 64, 0),
            (2, 4, 16, 2048, 0, 2 * 25600 * 5120)):
        row = rows[bits, replicas, kv]
        assert row.scores_bytes == scores * step * 4096 * 2 <= 1 << 29
        assert row.total_bytes - row.scores_bytes == pytest.approx(
            row.file_bytes + row.kv_bytes + 3 * step * 25600 * 2 + expanded * 2, rel=0.01)
    stored = plan.predict_model(config, chips.find("M1 Pro"), 4096)
    assert stored.total_bytes == rows[16, None, 16].total_bytes


@pytest.mark.parametrize("share", [2.5, 0.9])
def test_a_plain_cpu_holds_floats_as_float32_where_dense_weights_do_not_fit(monkeypatch, share):
    original = held_bytes(outline.network_of(CONFIG))
    machine = Host("this CPU", int(share * original), ceiling=20.0, dense=True)
    monkeypatch.setattr(plan, "host", lambda *asked: machine)
    rows = plan.plan("x", config=CONFIG, context=1).rows
    row = next(row for row in rows if row.method == "original")
    assert row.bytes_per_token == 2 * original + row.kv_bytes and row.file_bytes == original


def test_quality_is_found_where_it_was_measured():
    own, other = (quality.lookup(name, 2, 4, 0) for name in ("smollm2-135m", "Llama-3.1-8B"))
    assert (own.rank, other.rank) == (0, 1) and own.ratio == other.ratio > 1
    assert "not on this model" in other.source and "not on this model" not in own.source
    for name, rank in {".": 1, "Instruct": 1, "smollm2": 1, "SmolLM2-135M": 1,
                       "a/SmolLM2-135M-Instruct-8bit": 0}.items():
        assert quality.lookup(name, 2, 4, 0).rank == rank, name
    assert quality.lookup("x", 4, None, 128).source.startswith("published, Llama-2-7B")
    assert quality.lookup("x", 7, None, 64) is None


@pytest.mark.parametrize("options, says", [
    (dict(chip="M5 Max 32c"), "allowed is --memory"), (dict(chip="M77"), "no chip 'M77'"),
    (dict(context=0), "context is 0"), (dict(chip="M1", memory="lots"), "is no size")])
def test_what_cannot_be_planned_is_refused(options, says):
    with pytest.raises(MlxquantError, match=says):
        plan.plan("x", config=CONFIG, **options)


@pytest.mark.parametrize("config, says", [({"model_type": "nothing"}, "nothing not supported"),
                                          ({"model_type": "llama"}, "does not make a model")])
def test_a_configuration_that_makes_no_model(tmp_path, config, says):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(MlxquantError, match=says):
        plan.plan(str(tmp_path / "config.json"), chip="M1")


def test_only_the_configuration_of_a_repository_is_fetched(monkeypatch, tmp_path):
    from mlxquant.sources import names as models

    asked = []
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))

    def download(repository, *, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns))
        return tmp_path

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert models.config_of("owner/name") == CONFIG
    assert asked == [("owner/name", None, ["config.json"])]
