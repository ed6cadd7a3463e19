"""What cannot fit is refused before anything is written."""

import pytest
from conftest import job

import mlxquant
from mlxquant.base.errors import TooLarge
from mlxquant.model.loading import open_lazily
from mlxquant.quantise import room


def test_a_block_takes_its_float32_weights_and_its_widest_inputs_moments(tiny_folder):
    network, _ = open_lazily(tiny_folder)
    weights = 64 * 128 * 2 + 64 * 64 * 2 + 3 * 64 * 128 + 2 * 64
    assert room.working_bytes(network.layers[0]) == 4 * (weights + 128**2)


@pytest.mark.parametrize("bits,method", [(4, "rtn"), (2, "rtn"), (3, "gptq")])
def test_the_estimate_is_near_what_is_written(tiny_folder, tmp_path, monkeypatch, bits, method):
    asked = []
    monkeypatch.setattr(room, "require_space", lambda output, needed, purpose: asked.append(needed))
    text = tmp_path / "text.txt"
    text.write_text("All work and no play makes Jack a dull boy. " * 20)
    mlxquant.quantize(str(tiny_folder), tmp_path / "out",
                      job(method=method, bits=bits, text=str(text), samples=2, length=16))
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    ends = 4 * 64 * (384 + 1)
    assert 2 * written - ends == pytest.approx(asked[0], rel=0.2)


def test_too_little_disk_or_memory_is_said_before_the_start(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "memory_limit", lambda: 1000)
    with pytest.raises(TooLarge,
                       match="the largest block with its statistics needs 0.00 GB of memory"):
        mlxquant.quantize(str(tiny_folder), tmp_path / "out", job(method="rtn"))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(TooLarge, match="quantising into out needs 0.00 GB on the disk"):
        mlxquant.quantize(str(tiny_folder), tmp_path / "out", job(method="rtn"))
    assert list(tmp_path.iterdir()) == []
