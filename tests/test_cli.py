"""The command line: help, JSON keys, exit codes, one line for an error."""

import io
import json
import subprocess
import sys
import time
from functools import partial
from threading import TIMEOUT_MAX

import architectures
import pytest
from commands import run
from conftest import write_folder
from huggingface_hub import constants
from typer.main import get_command
from typer.testing import CliRunner

from mlxquant.cli import app
from mlxquant.cli.common import PANELS

GENERATE_KEYS = {
    "text", "prompt_tokens", "generation_tokens", "prompt_tps", "generation_tps", "ttft_s",
    "bytes_per_token", "gb_per_s", "ceiling_gb_per_s", "ceiling_source", "percent_of_ceiling",
    "peak_memory_gb", "finish_reason"}


@pytest.mark.parametrize("verb", get_command(app).commands)
def test_every_verb_has_help_with_an_example(verb):
    result = CliRunner().invoke(app, [verb, "--help"])
    assert result.exit_code == 0 and f"Example: mlxquant {verb}" in result.stdout
    assert ("--json" in result.stdout) is (verb not in ("chat", "serve"))


def test_help_lists_every_verb_in_a_panel_with_a_whole_sentence():
    result = CliRunner().invoke(app, ["--help"], terminal_width=80)
    assert max(map(len, result.stdout.splitlines())) <= 80 and "..." not in (
        result.stdout.partition("Options:")[2])
    said = " ".join(result.stdout.split())
    for title, verbs in PANELS.items():
        assert f"{title}: {verbs[0]}" in said
    commands = get_command(app).commands
    assert sorted(verb for verbs in PANELS.values() for verb in verbs) == sorted(commands)
    for verb, command in commands.items():
        assert f"{verb} {' '.join(command.help.partition(chr(10) * 2)[0].split())}" in said


def test_generate_prints_the_text_and_reports_on_stderr(tiny_folder):
    result = run("generate", tiny_folder, "-p", "Hello", "--max-tokens", 8)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("\n") and "tokens/s" in result.stderr
    assert "measured here" in result.stderr


def test_generate_json_has_every_key(tiny_folder):
    result = run("generate", tiny_folder, "--max-tokens", 4, "--json", stdin="Hello")
    value = json.loads(result.stdout)
    assert set(value) >= GENERATE_KEYS
    assert value["generation_tokens"] == 4 and value["finish_reason"] == "length"
    assert value["ceiling_source"] == "probe" and value["percent_of_ceiling"] > 0


def test_generate_options_reach_the_model(tiny_folder):
    arguments = ("generate", tiny_folder, "-p", "Hello", "--max-tokens", 20, "--json")
    plain = json.loads(run(*arguments).stdout)
    stopped = json.loads(run(*arguments, "--stop", plain["text"][4:6]).stdout)
    assert stopped["text"] == plain["text"][:plain["text"].index(plain["text"][4:6])]
    raw = json.loads(run(*arguments, "--raw").stdout)
    assert raw["prompt_tokens"] == 5 < plain["prompt_tokens"]


def test_generate_guesses_ahead(tiny_folder):
    arguments = ("generate", tiny_folder, "-p", "one two three one two", "--max-tokens", 20,
                 "--json")
    plain, looked_up, drafted = (json.loads(run(*arguments, *how).stdout) for how in (
        (), ("--lookup", 5), ("--draft", tiny_folder, "--draft-tokens", 3)))
    assert looked_up["text"] == plain["text"] == drafted["text"] and plain["guessed_tokens"] is None
    assert drafted["guessed_tokens"] == 15 and looked_up["guessed_tokens"] >= 0


def test_evaluate_json(tiny_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("All work and no play makes Jack a dull boy. " * 20)
    result = run("evaluate", tiny_folder, "--text", text, "--context", 64, "--windows", 3, "--json")
    value = json.loads(result.stdout)
    assert set(value) == {"perplexity", "tokens", "context", "windows", "bos", "bits_per_weight",
                          "file_bytes"}
    assert (value["tokens"], value["windows"], value["bits_per_weight"]) == (3 * 63, 3, 32)


def test_inspect_json_and_table(tiny_folder):
    value = json.loads(run("inspect", tiny_folder, "--json").stdout)
    assert {"architecture", "parameters", "active_parameters", "bits_per_weight", "file_bytes",
            "bytes_per_token", "layers"} <= set(value)
    assert set(value["layers"][0]) == {"path", "format", "bits", "shape", "bytes"}
    assert "mlp.down_proj" in run("inspect", tiny_folder).stdout


def test_inspect_says_once_why_layers_stand_by_themselves(tiny_folder, tmp_path):
    said = run("inspect", architectures.write("dbrx", tmp_path / "dbrx")).stdout
    assert said.count("run, by itself: the network cannot be traced: [eval] Attempting") == 1
    assert "traced" not in run("inspect", tiny_folder).stdout


def test_chat_through_a_pipe(tiny_folder):
    result = run("chat", tiny_folder, "--max-tokens", 6, "--seed", 1, stdin="hi\n/stats\n/exit\n")
    assert result.returncode == 0 and result.stdout.endswith("\n")
    assert "tokens of context in use" in result.stderr


def _offline_hub(cache):
    constants.HF_HUB_CACHE, constants.HF_HUB_OFFLINE = str(cache), True


def test_a_revision_is_that_of_the_first_model_alone(tmp_path):
    for repository, revision in (("a--one", "v1"), ("b--two", "main")):
        folder = tmp_path / f"models--{repository}"
        write_folder(folder / "snapshots" / ("0" * 40))
        (folder / "refs").mkdir()
        (folder / "refs" / revision).write_text("0" * 40)
    result = run("chat", "a/one", "--revision", "v1", stdin="/model b/two\n/model a/one\n",
                 before=partial(_offline_hub, tmp_path))
    assert "(now b/two;" in result.stderr and "(now a/one;" in result.stderr
    assert "error" not in result.stderr


@pytest.mark.parametrize("arguments,code,message", [
    (("generate", "no-such-model", "-p", "x"), 1, "error: no model named 'no-such-model'"),
    (("inspect", "./nowhere"), 1, "error: no such file or folder: ./nowhere"),
    (("evaluate", "TINY", "--text", "/no/file"), 1, "error: no such file: /no/file"),
    (("generate", "TINY", "-p", "x", "--memory", "1KB"), 1, "error: TINY needs"),
    (("generate", "TINY", "-p", "x", "--temp", "-1"), 2, "error: temperature is -1.0, allowed are"),
    (("generate", "TINY", "-p", "x", "--kv-bits", "7"), 2, "error: kv_bits is 7, allowed are"),
    (("generate", "TINY", "-p", "x", "--memory", "lots"), 2, "error: 'lots' is no size"),
    (("chat", "TINY", "--max-tokens", "0"), 2, "error: max_tokens is 0, at least 1"),
    (("bench", "TINY", "--format", "xml"), 2,
     "error: format is 'xml', allowed are md, json, jsonl, csv"),
    (("bench", "TINY", "--chip", "M77"), 2, "error: no chip 'M77' in the table"),
    (("bench", "TINY", "--chip", "M2", "-n", "0"), 2, "error: --generate is for measuring"),
    (("bench", "TINY", "--chip", "M2", "-d", "-5"), 2, "error: depth is -5, at least 0"),
    (("bench", "TINY", "--json", "--format", "csv"), 2, "error: --format and --json exclude each"),
    (("generate", "TINY", "-p", "x", "--raw", "--system", "y"), 2, "error: --system goes without"),
    (("generate", "TINY", "-p", "x", "--draft-tokens", "7"), 2, "error: --draft-tokens needs --d"),
    (("generate", "TINY", "-p", "x", "--top-p", "0.9"), 2, "error: --top-p needs --temp above 0"),
    (("evaluate", "TINY", "--text", "TINY/config.json", "--questions", "0"), 2,
     "error: --questions needs --tasks"),
    (("evaluate", "TINY", "--tasks", "x", "--windows", "3"), 2, "error: --windows needs --text"),
    (("inspect", "TINY", "--revision", "v1"), 2, "error: revision is 'v1', but TINY is no Hug"),
    (("plan", "TINY", "--revision", "v1"), 2, "error: revision is 'v1', but TINY is no Hug"),
    (("plan",), 2, "error: give MODEL or --config FILE"),
    (("plan", "no-such-model"), 1, "error: no model named 'no-such-model'"),
    (("quantize", "TINY", "-o", "out", "--siblings-alike"), 2,
     "error: --siblings-alike is for budgets"),
    (("generate",), 2, "Missing argument"),
    (("generate", "TINY", "--no-such-option"), 2, "No such option"),
    (("levitate",), 2, "No such command"),
])
def test_failures_are_one_line_with_the_right_code(tmp_path, arguments, code, message):
    if "TINY" in arguments:
        write_folder(tmp_path / "TINY")
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == code and result.stdout == ""
    assert message in result.stderr and "Traceback" not in result.stderr
    if message.startswith("error"):
        assert len([x for x in result.stderr.splitlines() if x.startswith("error")]) == 1


def test_a_system_prompt_is_refused_where_there_is_no_place_for_it(tmp_path):
    config = write_folder(tmp_path / "TINY") / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": None}))
    result = run("generate", "TINY", "-p", "x", "--system", "y", cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert "error: --system needs a chat template, and TINY has none" in result.stderr


def test_version():
    import mlxquant as package

    command = [sys.executable, "-m", "mlxquant", "--version"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed == f"mlxquant {package.__version__}\n"


def test_chips_plan_and_prediction_as_json(tiny_folder):
    value = json.loads(run("chips", "--json").stdout)
    assert value["here"]["name"]
    assert {"name", "gpu_cores", "headline_gb_per_s", "sources"} <= set(value["chips"][0])
    value = json.loads(run("chips", "--backtest", "--json").stdout)
    assert {row["chips"] for row in value["families"]} >= {"base", "Pro", "Max", "Ultra", "all"}
    planned = run("plan", "--config", tiny_folder / "config.json", "--chip", "M2", "--json")
    value = json.loads(planned.stdout)
    assert {"bits", "replicas", "group", "bits_per_weight", "file_bytes", "total_bytes", "fits",
            "tps", "quality", "quality_source"} <= set(value["rows"][0])
    value = json.loads(run("bench", tiny_folder, "--chip", "M2 Max 30c", "--json").stdout)
    assert value[0]["predicted"] and value[0]["gpu_cores"] == 30 and value[0]["assumptions"]


def test_tables_are_not_cut_short(tiny_folder):
    assert "NVIDIA H100 80GB HBM3" in run("chips").stdout
    assert "M3 Max 30c" in run("chips", "--lanes").stdout
    result = run("plan", tiny_folder, "--chip", "M1 Pro 14c", "--context", 100)
    assert "original 16 bit" in result.stdout and "Recommended: " in result.stdout
    assert "…" not in result.stdout


def test_bench_writes_a_file_and_shows_a_table(tiny_folder, tmp_path):
    result = run("bench", tiny_folder, "-p", 8, "-n", 4, "-r", 1, "--format", "jsonl",
                 "-o", tmp_path / "x.jsonl", "--plot", tmp_path / "x.png")
    assert result.returncode == 0 and "| tg4 |" in result.stdout
    written = (tmp_path / "x.jsonl").read_text().splitlines()
    assert [json.loads(line)["test"] for line in written] == ["pp8", "tg4"]
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_a_prediction_is_written_in_the_format_that_was_asked_for(tiny_folder, tmp_path):
    arguments = ("bench", tiny_folder, "--chip", "M2", "-o", tmp_path / "written")
    shown = run(*arguments).stdout
    assert "tokens/s" in shown and (tmp_path / "written").read_text() == shown
    assert run(*arguments, "--json").stdout == shown
    assert json.loads((tmp_path / "written").read_text())[0]["predicted"]


def test_each_part_of_a_job_has_a_bar_of_its_own(monkeypatch):
    from rich.progress import Progress

    from mlxquant.cli.common import progress

    shown, until = {}, {}
    plain = Progress.update

    def update(bar, task, **values):
        plain(bar, task, **values)
        shown[task] = (values["description"], values["completed"], values["total"])
        until[values["description"]] = values["until"]

    monkeypatch.setattr(Progress, "update", update)
    with progress("tuning:") as advance:
        advance(1, 2, None, "talking")
        advance(2, 2, None, "talking")
        assert until["talking"] == pytest.approx(time.monotonic(), abs=9)
        advance(3, 9, 0.5)
        advance(3, 9, 0.5, left=1000)
        assert until["tuning: 0.50"] == pytest.approx(time.monotonic() + 1000, abs=9)
    assert sorted(shown.values()) == [("talking", 2, 2), ("tuning: 0.50", 3, 9)]


@pytest.mark.parametrize("after,calls,shown", [(0, False, True), (TIMEOUT_MAX, False, False),
                                               (TIMEOUT_MAX, True, True)])
def test_a_bar_appears_in_time_or_with_the_first_call(monkeypatch, after, calls, shown):
    from mlxquant.cli import common

    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with common.progress("importing [/x] \x1b[2J", after) as advance:
        if calls:
            advance(1, 2, 0.5)
        for _ in range(1000 * shown):
            if "importing" in terminal.getvalue():
                break
            time.sleep(0.01)
    assert ("importing [/x] " in terminal.getvalue()) is shown
    assert "\x1b[2J" not in terminal.getvalue()
