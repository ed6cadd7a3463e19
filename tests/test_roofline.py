"""The ceiling probe, the chip table, and the report that uses them."""

import json

import mlx.core as mx
import pytest

from mlxquant import report
from mlxquant.roofline import chips, probe


@pytest.fixture
def small_probe(monkeypatch, tmp_path):
    monkeypatch.setenv("MLXQUANT_CACHE", str(tmp_path))
    monkeypatch.setattr(probe, "_ROWS", 64)
    return tmp_path


def test_probe_measures_once_and_is_cached(small_probe, capsys):
    first = probe.read_ceiling()
    assert first.gb_per_s > 0 and first.spread >= 0 and first.mlx == mx.__version__
    assert probe.read_ceiling() == first
    assert capsys.readouterr().err.count("Measuring") == 1
    assert probe.read_ceiling(refresh=True).kernel


def test_probe_survives_a_broken_cache(small_probe):
    probe.read_ceiling()
    file = next((small_probe / "probe").glob("*.json"))
    file.write_text('{"gb_per_s"')
    assert probe.read_ceiling().gb_per_s > 0
    assert json.loads(file.read_text())["gb_per_s"] > 0


def test_probe_reads_more_than_any_cache_holds():
    assert probe._MATRICES * probe._ROWS * probe._COLUMNS * 4 >= 1 << 30


@pytest.mark.parametrize("name,cores,expected", [
    ("Apple M1 Pro", 14, 200), ("Apple M3 Max", 30, 300), ("Apple M3 Max", 40, 400),
    ("Apple M4 Max", 40, 546), ("Apple M4 Max", None, None), ("Apple M9", 10, None),
    ("Apple A18 Pro", 5, None), ("Apple Paravirtual device", None, None)])
def test_headline_bandwidth_is_known_or_absent(name, cores, expected):
    assert chips.headline(name, cores) == expected


def test_a_mac_is_recognised_from_its_own_words(monkeypatch):
    answers = {"sysctl": "Apple M3 Max", "ioreg": '  "gpu-core-count" = 30\n  "other" = 1'}
    monkeypatch.setattr(chips.sys, "platform", "darwin")
    monkeypatch.setattr(chips, "_output", lambda command, *_: answers[command])
    assert chips.detect.__wrapped__() == chips.Chip("Apple M3 Max", 30, 300)
    answers.update(sysctl="", ioreg="")
    assert chips.detect.__wrapped__().headline_gb_per_s is None


def make(**changes):
    values = dict(prompt_tokens=100, cached_tokens=0, generation_tokens=21, ttft_s=0.5, decode_s=2.0,
                  bytes_per_token=2_000_000_000, peak_bytes=3_000_000_000)
    return report.make(**values | changes)


def test_report_arithmetic():
    result = make()
    assert (result.prompt_tps, result.generation_tps, result.gb_per_s) == (200, 10, 20)
    assert (result.percent_of_ceiling, result.ceiling_source) == (20, "probe")
    assert result.line() == ("prompt 100 tokens at 200.0 tokens/s · reply 21 tokens at 10.0 tokens/s · "
                             "2.000 GB/token, 20.0 GB/s = 20 % of 100.0 GB/s measured here · peak 3.00 GB")


def test_a_mac_shows_its_headline_too(monkeypatch):
    monkeypatch.setattr(chips, "detect", lambda: chips.Chip("Apple M1 Pro", 14, 200))
    assert "20 % of 100.0 GB/s measured here, 10 % of 200 GB/s stated" in make().line()
    assert "(+50 cached)" in make(cached_tokens=50).line()
