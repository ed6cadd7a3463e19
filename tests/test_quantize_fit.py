"""One command from a model to one that fits a machine: what it chooses, says, makes, measures."""

import json
import re
import shlex
from dataclasses import asdict, replace

import pytest
from commands import run
from conftest import CONFIG, write_telling
from test_plan import LLAMA
from typer.main import get_command
from typer.testing import CliRunner

import mlxquant
from mlxquant import cli
from mlxquant.base.errors import BadValue, MlxquantError, TooLarge
from mlxquant.cli.fit import chosen
from mlxquant.report import made, plan
from mlxquant.report.divergence import Divergence, divergence
from mlxquant.report.made import HeldOut
from mlxquant.report.plan import choose

FEW = ("--samples", 4, "--sequence-length", 32, "--windows", 2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model ``source`` and a ``text.txt``."""
    folder = write_telling(tmp_path_factory.mktemp("fit"), CONFIG | {"tie_word_embeddings": False})
    (folder / "other.txt").write_text("a mat and a cat and the mat " * 60)
    return folder


@pytest.fixture(scope="module")
def two_bits(place):
    return run("quantize", "source", "-o", "small", "--fit", "8GB", "--for-chip", "M1 Pro",
               "--bits", 2, "--tune-steps", 2, "--data", "text.txt", "--text", "other.txt", *FEW,
               cwd=place)


def test_the_command_it_prints_makes_the_same_bytes(place, two_bits):
    assert two_bits.returncode == 0, two_bits.stderr
    command = re.search(r"^the same by hand: mlxquant (.*)$", two_bits.stdout, re.MULTILINE)[1]
    words = shlex.split(command)
    assert "--fit" not in words and "--for-chip" not in words and "--tune-blocks" in words
    words[words.index("-o") + 1] = "again"
    again = run(*words, "--json", cwd=place)
    assert again.returncode == 0, again.stderr
    weights = [(place / name / "model.safetensors").read_bytes() for name in ("small", "again")]
    assert weights[0] == weights[1]
    measured = json.loads(again.stdout.splitlines()[-1])
    assert measured.pop("stage") == "measured"
    models = [mlxquant.load(str(place / name)) for name in ("again", "source")]
    expected = asdict(divergence(*models, place / "other.txt", context=32, windows=2))
    assert measured == pytest.approx(expected, rel=1e-3, abs=1e-6)  # by another BLAS
    assert Divergence(**measured).line() in two_bits.stdout and measured["kl_mean"] > 1e-6


def test_it_takes_what_the_plan_recommends_and_says_how_to_chat(place, two_bits):
    result = plan.plan(str(place / "source"), memory="8GB", chip="M1 Pro")
    best = plan.recommend([row for row in result.rows if row.bits == 2 and row.command])
    assert f" {best.label()} with {best.kv_bits}-bit keys" in two_bits.stdout
    assert f"perplexity × {best.quality:.2f} ({best.quality_source})" in two_bits.stdout
    assert two_bits.stdout.endswith("\nmlxquant chat small\n") and "2 steps each" in two_bits.stdout
    assert "4 samples of 32 tokens from text.txt" in two_bits.stdout
    made_of_it = mlxquant.inspect(str(place / "small")).bits_per_weight
    assert made_of_it == pytest.approx(best.bits_per_weight, rel=0.01)


def test_without_a_text_the_model_writes_one(place):
    result = run("quantize", "source", "-o", "eight", "--fit", "8GB", "--json", *FEW,
                 "--data", "text.txt", cwd=place)
    first, *_, last = map(json.loads, result.stdout.splitlines())
    assert first["form"]["bits"] == 8 and first["chat"] == "mlxquant chat eight"
    assert "--text self" in first["command"] and first["memory_bytes"] < 8e9
    assert "--method rtn" in first["command"] and "--data" not in first["command"]  # not read
    assert last["stage"] == "measured" and last["windows"] >= 1 and last["kl_mean"] >= 0
    assert mlxquant.inspect(str(place / "eight")).bits_per_weight == 8.5


def test_an_override_that_only_rounds_reads_no_text_either(place):
    result = run("quantize", "source", "-o", "rounded", "--fit", "8GB", "--json", *FEW,
                 "--data", "text.txt", "--override", "*.v_proj:bits=6", cwd=place)
    assert "--data" not in json.loads(result.stdout.splitlines()[0])["command"]
    assert 8 < mlxquant.inspect(str(place / "rounded")).bits_per_weight < 8.5


def test_an_original_too_large_to_load_leaves_the_perplexity(place, two_bits, monkeypatch):
    original = str(place / "source")

    def load(name, **options):
        if name == original:
            raise TooLarge("too large")
        return mlxquant.load(name, **options)

    monkeypatch.setattr(made, "load", load)
    held_out = HeldOut(str(place / "other.txt"), 2, 32, seed=1)
    found = held_out.measure(place / "small", original)
    assert type(found) is made.Perplexity and found.perplexity > 1
    with pytest.raises(TooLarge):
        replace(held_out, text=made.SELF).measure(place / "small", original)


@pytest.mark.parametrize("chip", [None, "M1 Pro"])
def test_where_nothing_fits_it_says_what_would(chip):
    def planned(memory, context):
        config = LLAMA | {"num_hidden_layers": 4, "vocab_size": 32000}
        result = plan.plan("Llama", config=config, chip=chip, memory=memory, context=context)
        return result, [row for row in result.rows if row.command]

    with pytest.raises(TooLarge, match="^nothing of Llama fits in 0.21 GB with 32,768 tokens: "
                       r"2 bit, .* takes .* GB; --fit \d+GB would do$") as caught:
        choose(*planned("0.3GB", 32768), chip)
    (size,) = re.findall(r"--fit (\d+GB)", str(caught.value))
    assert choose(*planned(size, 32768), chip).fits
    with pytest.raises(TooLarge, match=r"--fit \d+GB or --fit-context") as caught:
        choose(*planned("2GB", 300_000), chip)
    tokens = int(re.search(r"--fit-context (\d+)", str(caught.value))[1])
    assert choose(*planned("2GB", tokens), chip).fits
    with pytest.raises(TooLarge):
        choose(*planned("2GB", tokens + 256), chip)


@pytest.mark.parametrize("size,asked", [("1.2GB", ()), ("1.2GB", ("--bits", "2")), ("4GB", ())])
def test_below_four_bits_layers_of_several_widths_fill_the_room(tmp_path, capsys, size, asked):
    config = tmp_path / "llama.json"
    config.write_text(json.dumps(LLAMA | {"num_hidden_layers": 4, "vocab_size": 32000}))
    result = plan.plan(str(config), memory=size, chip="M1 Pro")
    words = [str(config), "-o", "small", "--fit", size, "--for-chip", "M1 Pro", *asked]
    verb = get_command(cli.app).commands["quantize"]
    wanted, _ = chosen(verb.make_context("quantize", words))
    by_hand = capsys.readouterr().out.partition("by hand: mlxquant quantize ")[2]
    assert verb.make_context("quantize", shlex.split(by_hand)).params["target_gb"] == (
        wanted["target_gb"])
    if asked or size == "4GB":
        assert wanted["target_gb"] is None and wanted["embedding_bits"] in (6, 8)
        return
    best = result.recommended
    beside = best.total_bytes - best.file_bytes
    assert best.bits == 2 and wanted["embedding_bits"] is None
    assert best.file_bytes < 1e9 * wanted["target_gb"] <= result.memory_bytes - beside


@pytest.mark.parametrize("options,code,message", [
    (("--fit", "8GB", "--bits", "7"), 2, "none of the forms .* has a measured quality"),
    (("--fit", "1MB"), 1, "nothing of source fits in 0.00 GB"),
    (("--fit", "lots"), 2, "'lots' is no size"),
    (("--fit", "8GB", "--target-bpw", "2.4"), 2, "two sizes; give one"),
    (("--fit", "8GB", "--for-chip", "M77"), 2, "no chip 'M77'"),
])
def test_what_cannot_be_is_one_line_before_any_work(place, options, code, message):
    result = run("quantize", "source", "-o", "never", *options, cwd=place)
    assert result.returncode == code and re.search(message, result.stderr), result.stderr
    assert result.stderr.count("\n") == 1 and not result.stdout
    assert not (place / "never").exists()


@pytest.mark.parametrize("changes,kind,message", [
    ({"text": "nowhere"}, MlxquantError, "no such file: nowhere"),
    ({"windows": 0}, BadValue, "windows is 0"),
    ({"windows": 10_000}, BadValue, "10000 windows of 32 need 320000"),
])
def test_a_text_that_cannot_serve_is_refused_beforehand(place, changes, kind, message):
    held_out = HeldOut(str(place / "other.txt"), 2, 32, seed=1)
    held_out.check(str(place / "source"), [str(place / "text.txt")])
    with pytest.raises(BadValue, match="is the calibration text"):
        held_out.check(str(place / "source"), [str(place / "other.txt")])
    with pytest.raises(kind, match=message):
        replace(held_out, **changes).check(str(place / "source"), [])


def test_help_shows_the_usual_options_first_and_every_option_once():
    text = CliRunner().invoke(cli.app, ["quantize", "--help"]).output
    usual, advanced = text.split("\nAdvanced:\n")
    shown = [re.findall(r"^  (?:-\w, )?(--[\w-]+)", part, re.MULTILINE)
             for part in (usual, advanced)]
    assert {"--fit", "--bits", "--data", "--help"} <= set(shown[0]) and len(shown[0]) <= 16
    assert "--act-order" in shown[1] and len(shown[1]) > len(shown[0])
    verb = get_command(cli.app).commands["quantize"]
    options = [param.opts[-1] for param in verb.params if param.opts[-1].startswith("--")]
    assert sorted(shown[0] + shown[1]) == sorted([*options, "--help"])
