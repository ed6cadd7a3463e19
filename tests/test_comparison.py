"""The methods side by side, and the verbs quantize and compare."""

import json
import re
from dataclasses import asdict

import numpy as np
import pytest
from commands import run
from conftest import job

from mlxquant.base.errors import BadValue
from mlxquant.codes.width import Width
from mlxquant.report import comparison

KEYS = {"method", "bits", "group_size", "rotated", "replicas", "replica_group", "bits_per_weight",
        "file_bytes", "perplexity", "kl_mean", "seconds", "peak_memory_gb"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "a", "mat"], 3000)
    path.write_text(" ".join(words))
    return path


def test_one_row_for_the_original_and_each_method(tiny_folder, text, tmp_path):
    rows = list(comparison.compare(
        str(tiny_folder), comparison.Evaluation(text, 64, 2),
        methods=["rtn", "gptq", "smoothquant"], bits=[Width.EIGHT, Width.TWO],
        job=job(text, samples=4, group_size=32)))
    assert [(r.method, r.bits) for r in rows] == [
        ("original", None), ("rtn", 8), ("gptq", 8), ("smoothquant", 8), ("rtn", 2), ("gptq", 2)]
    assert all(set(row) >= KEYS for row in map(asdict, rows))
    original, eight = rows[0], rows[1]
    assert original.kl_mean == 0 and original.seconds is None
    assert eight.bits_per_weight == 9 and 0 < eight.kl_mean < rows[4].kl_mean
    assert eight.file_bytes < original.file_bytes and eight.seconds > 0
    comparison.plot(rows, tmp_path / "plot.svg")
    assert "perplexity" in (tmp_path / "plot.svg").read_text()


@pytest.mark.parametrize("methods, bits, says", [
    ("magic", [4], "no method 'magic'; allowed are rtn, awq, gptq"),
    ("replica-4", [2, 8], "replica-4: bits is 8, allowed are 1, ternary, 2, 3, 4"),
    ("w8a8", [4, 3], "w8a8: bits is 4, 3, allowed is 8")])
def test_what_cannot_be_compared_is_refused_before_any_work(methods, bits, says):
    with pytest.raises(BadValue, match=says):
        next(comparison.compare("nowhere", comparison.Evaluation("text"), methods=["rtn", methods],
                                bits=[*map(Width.of, bits)]))


def test_any_group_size_can_be_compared():
    """The budget of mixed widths is for groups that divide a round number."""
    assert comparison._job("rtn", Width.FOUR, job(group_size=48)).spec.group_size == 48


def test_the_verbs(tiny_folder, text, tmp_path):
    made = run("quantize", tiny_folder, "-o", tmp_path / "out", "--bits", 3, "--group-size", 32,
               "--data", text, "--samples", 4, "--sequence-length", 64, "--override",
               "*.down_proj:bits=8", "--json")
    assert made.returncode == 0, made.stderr
    *blocks, value = map(json.loads, made.stdout.splitlines())
    assert [(line["stage"], line["blocks_done"], line["blocks"]) for line in blocks] == [
        ("quantising", 1, 2), ("quantising", 2, 2)]
    assert blocks[0]["seconds_left"] > 0 == blocks[1]["seconds_left"]
    assert value["profile"]["seconds"]["total"] >= value["seconds"]
    assert 4 < value["bits_per_weight"] < 9 and value["file_bytes"] > 0 and value["seconds"] > 0
    (tmp_path / "data").write_text(text.read_text()[::-1])
    options = ("--text", text, "--methods", "rtn", "--bits", 4, "--samples", 2,
               "--sequence-length", 64, "--context", 64, "--windows", 2)
    table = run("compare", tiny_folder, "--data", tmp_path / "data", *options, "--json")
    assert [row["method"] for row in json.loads(table.stdout)] == ["original", "rtn"]
    same = run("compare", tiny_folder, "--data", text, *options)
    assert same.returncode == 2 and "text.txt is the calibration text" in same.stderr
    (tmp_path / "data").write_text("the cat")
    short = run("compare", tiny_folder, "--data", tmp_path / "data", *options, "--methods",
                "rtn,gptq")
    assert short.returncode == 2 and short.stdout.count("\n") == 3 and "rtn" in short.stdout


@pytest.mark.parametrize("options,message", [
    (("--bits", "7"), "bits is '7'|bits is 7"),
    (("--override", "nosuch*:bits=8"), "no layer that can be quantised matches"),
    (("--rotate", "--rotate-fused"), "give one"), (("--method", "magic"), "allowed are rtn"),
    (("--method", "smoothquant"), "--activation-bits 8"),
    (("--method", "rtn", "--bits", "2"), "--data, --conversations and --tune-steps are without"),
    (("--for-chip", "M1 Pro", "--bits", "8"), "--for-chip is for --fit, and for replicas"),
])
def test_impossible_requests_exit_with_2_and_one_line(tiny_folder, text, tmp_path, options,
                                                      message):
    result = run("quantize", tiny_folder, "-o", tmp_path / "out", "--data", text, *options)
    assert result.returncode == 2 and not (tmp_path / "out").exists()
    assert re.search(message, result.stderr) and "Traceback" not in result.stderr
