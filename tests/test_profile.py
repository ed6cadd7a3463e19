"""What a job took is counted once, step by step, and told by the folder that it made."""

import json
import time

import mlx.core as mx
import pytest
from conftest import job

import mlxquant
from mlxquant.model.inspection import inspect
from mlxquant.quantise.job import Target
from mlxquant.quantise.profile import Pace, Profile, current, recording, step
from mlxquant.sources import checkpoint

STEPS = {"loading", "float pass", "observing", "factor", "sweep", "fit", "refine", "storing",
         "writing", "quantised pass", "rebuilding", "errors", "calibration text", "opening"}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("All work and no play makes Jack a dull boy. " * 40)
    return str(path)


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by a second at every look."""
    now = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))


def test_steps_inside_a_step_are_counted_apart(clock):
    @step("inner")
    def inner():
        pass

    with recording() as profile, step("outer"):
        inner()
        inner()
    assert profile.seconds == {"other": 1, "outer": 3, "inner": 2}


def test_the_steps_of_a_budget_are_told_from_those_of_the_job(clock):
    with recording() as profile:
        with step("weighing"), step("fit"):
            pass
        with step("fit"):
            pass
    assert profile.seconds == {"other": 2, "weighing": 2, "weighing: fit": 1, "fit": 1}


def test_a_step_keeps_the_most_memory_that_was_held_in_it():
    with recording() as profile:
        with step("small"):
            mx.eval(mx.zeros(1000))
        with step("large"):
            mx.eval(mx.zeros(1 << 20))
        with step("small"):
            mx.eval(mx.zeros(1000))
    assert profile.peaks["large"] - profile.peaks["small"] > 3 << 20
    assert profile.peak_memory == profile.peaks["large"] and profile.host_peak > 1 << 20


def test_outside_a_job_and_after_an_error_nothing_is_open():
    with step("alone"):
        pass
    with pytest.raises(KeyError), recording(), step("broken"):
        raise KeyError
    with recording() as profile:
        assert current() is profile and not profile.seconds


def test_a_job_that_goes_on_adds_to_what_its_first_run_took(tmp_path, clock):
    with recording() as first:
        with step("fit"):
            pass
        first.write(tmp_path / "making.json")
    second = Profile(peaks={"fit": 1 << 40})
    second.go_on_from(tmp_path / "making.json")
    assert (second.seconds["fit"], second.runs, second.peaks["fit"]) == (1, 2, 1 << 40)


def test_time_left_is_known_from_the_first_block_on_and_by_those_made_in_this_run():
    fresh, resumed = Pace(), Pace()
    assert [fresh.left(done, 4, 30.0 * done) for done in (1, 2, 4)] == [90, 60, 0]
    resumed.left(1, 10, 0.1)
    resumed.left(2, 10, 0.2)
    assert resumed.left(3, 10, 20.2) == pytest.approx(7 * 20)


@pytest.mark.parametrize("method", ["gptq", "replica"])
def test_the_folder_tells_what_its_making_took(tmp_path, tiny_folder, text, method):
    made = mlxquant.quantize(str(tiny_folder), tmp_path / "out", job(
        text, 2, 16, method=method, bits=2, rotation="online", propagation="corrected"))
    told = inspect(str(tmp_path / "out")).making
    assert told["seconds"].keys() >= STEPS and told["seconds"].keys() == (
        told["peak_memory_gb"].keys())
    steps = [seconds for name, seconds in told["seconds"].items() if name != "total"]
    assert sum(steps) == pytest.approx(told["seconds"]["total"], abs=0.02)
    assert told["seconds"]["total"] > 0 < made.seconds and told["runs"] == 1
    assert told["peak_memory_gb"]["total"] <= made.peak_memory / 1e9 + 1e-4
    assert "making.json" not in checkpoint.side_files(tmp_path / "out")  # copies are made anew


def test_a_budget_is_weighed_in_steps_of_its_own(tmp_path, tiny_folder, text):
    made = mlxquant.quantize(str(tiny_folder), tmp_path / "out", job(
        text, 2, 16, target=Target(bits_per_weight=4)))
    assert {"weighing", "weighing: factor", "weighing: sweep", "weighing: gradients",
            "sweep"} <= made.profile["seconds"].keys()


def test_a_killed_job_tells_of_both_runs_and_its_config_of_neither(tmp_path, tiny_folder, text):
    def kill(*_):
        raise KeyboardInterrupt

    asked = job(text, 2, 16, bits=3)
    mlxquant.quantize(str(tiny_folder), tmp_path / "whole", asked)
    with pytest.raises(KeyboardInterrupt):
        mlxquant.quantize(str(tiny_folder), tmp_path / "killed", asked, progress=kill)
    mlxquant.quantize(str(tiny_folder), tmp_path / "killed", asked)
    told = json.loads((tmp_path / "killed" / "making.json").read_text())
    assert told["runs"] == 2 and told["seconds"]["sweep"] > 0
    whole, killed = ((tmp_path / name / "config.json").read_bytes() for name in ("whole", "killed"))
    assert whole == killed


@pytest.mark.parametrize("content", [
    "{", "[]", "{}", '{"seconds": 1, "peak_memory_gb": {}, "host_peak_gb": 1, "runs": 1}',
    '{"seconds": {"total": "long", "a": 1}, "peak_memory_gb": {"total": 1, "a": 1}, '
    '"host_peak_gb": 1, "runs": 1}'])
def test_another_file_of_the_records_name_is_no_record(tmp_path, tiny_folder, content):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "making.json").write_text(content)
    assert inspect(str(folder)).making is None
