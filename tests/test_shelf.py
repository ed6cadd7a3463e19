"""Hidden states that wait on the disk: the same bytes as from memory, and nothing left behind."""

import gc

import mlx.core as mx
import numpy as np
import pytest
from architectures import write
from conftest import job

import mlxquant
from mlxquant.base.errors import CannotWrite, TooLarge
from mlxquant.model.loading import open_lazily
from mlxquant.quantise import room
from mlxquant.quantise.assembly import blocks_of
from mlxquant.quantise.shelf import Shelf, shelf

TUNED = dict(tune_blocks=True, tune_steps=4, method="replica", bits=2, rotation="online", refine=0)

STATES = 2 * 4 * 4096 * 512 * 64  # bytes of 4,096 windows, 64 wide, behind both kinds of blocks


@pytest.fixture
def spilled(monkeypatch):
    """Every job spills; the most arrays that lay on the disk at once, and what was read."""
    monkeypatch.setattr(room, "_SPILL_SHARE", 0)
    seen, put = [0], Shelf.put

    def watched(self, tree, batch):
        put(self, tree, batch)
        seen[0] = max(seen[0], len(self._files))
        assert all(file.exists() for file in self._files.values())

    monkeypatch.setattr(Shelf, "put", watched)
    return seen


def made(source, output, text, **options):
    mlxquant.quantize(str(source), output, job(text, **dict(samples=5, length=32) | options))
    return [(output / name).read_bytes() for name in ("model.safetensors", "config.json")]


@pytest.mark.parametrize("options", [
    TUNED | dict(propagation="corrected"), dict(bits=3, propagation="quantised"),
    dict(bits=4, propagation="float"), dict(bits=3, rotation="fused", propagation="corrected")])
def test_states_on_disk_give_the_bytes_of_states_in_memory(
        tmp_path, tiny_folder, text, monkeypatch, spilled, options):
    on_disk = made(tiny_folder, tmp_path / "disk", text, **options)
    assert spilled[0] >= 3  # batches, of two sequences
    monkeypatch.setattr(room, "_SPILL_SHARE", 1)
    assert made(tiny_folder, tmp_path / "memory", text, **options) == on_disk
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "memory"]


@pytest.mark.parametrize("name", ["gemma3n", "deepseek_v3", "rwkv7", "recurrent_gemma"])
def test_networks_that_keep_states_of_their_own_find_them_again(
        tmp_path, text, monkeypatch, spilled, name):
    """Some read an earlier hidden state later on, or hand several to a block."""
    source = write(name, tmp_path / "source")
    options = dict(bits=4, propagation="corrected", method="gptq", group_size=32, refine=0)
    on_disk = made(source, tmp_path / "disk", text, **options)
    assert spilled[0] > 0
    monkeypatch.setattr(room, "_SPILL_SHARE", 1)
    assert made(source, tmp_path / "memory", text, **options) == on_disk


def test_a_stopped_run_leaves_no_states_and_goes_on_to_the_same_bytes(
        tmp_path, tiny_folder, text, spilled):
    def stop(*_):
        raise KeyboardInterrupt

    asked, hidden = job(text, 4, 32, bits=3), tmp_path / "out.partial" / "hidden"
    with pytest.raises(KeyboardInterrupt):
        mlxquant.quantize(str(tiny_folder), tmp_path / "out", asked, progress=stop)
    assert hidden.parent.exists() and not hidden.exists()
    hidden.mkdir()  # as a run leaves it that is killed
    (hidden / "0.safetensors").write_text("stale")
    whole = made(tiny_folder, tmp_path / "whole", text, samples=4, bits=3)
    assert made(tiny_folder, tmp_path / "out", text, samples=4, bits=3) == whole
    assert not hidden.parent.exists()


@pytest.mark.parametrize("limit", [8 * STATES - 1, STATES + 4_000_000])
def test_the_disk_must_have_room_for_what_memory_has_not(
        tmp_path, tiny_folder, monkeypatch, limit):
    """An eighth of the memory, or what is left beside all else."""
    network, _ = open_lazily(tiny_folder)
    asked = job("text.txt", 4096, 512, bits=3, propagation="corrected")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": STATES}))
    monkeypatch.setattr(room, "memory_limit", lambda: 8 * STATES)
    assert not room.check(network, blocks_of(network), tmp_path / "out", asked, 4).waiting
    monkeypatch.setattr(room, "memory_limit", lambda: limit)
    if limit < 8 * STATES - 1:
        monkeypatch.setattr(room, "_SPILL_SHARE", 1)
    with pytest.raises(TooLarge, match=r"quantising into out needs 1\.\d+ GB on the disk"):
        room.check(network, blocks_of(network), tmp_path / "out", asked, 4)


def test_an_array_put_away_is_free_wherever_it_is_held(tmp_path):
    with shelf(tmp_path / "hidden", True) as waiting:
        state, other = mx.random.normal((2, 300, 400)), mx.ones((300, 400))
        mx.eval(state, other)
        held, wanted, before = [state], np.array(state), mx.get_active_memory()
        waiting.put((state, {"mask": other}), (2, 300))
        assert mx.get_active_memory() < before - 900_000 and other.sum().item() == other.size
        read = waiting.read({"x": held, "n": 3})
        assert np.array_equal(read["x"][0], wanted) and read["n"] == 3
        waiting.put(state, (2, 300))
        assert len(list((tmp_path / "hidden").iterdir())) == 1
        waiting.give_back(held)
        assert np.array_equal(state, wanted) and not list((tmp_path / "hidden").iterdir())
        waiting.put(state, (2, 300))
        del state, held, read
        gc.collect()
        assert not list((tmp_path / "hidden").iterdir())
        (tmp_path / "hidden").rmdir()
        with pytest.raises(CannotWrite, match="0?.safetensors"):
            waiting.put(mx.array(wanted), (2, 300))
    assert not (tmp_path / "hidden").exists()
