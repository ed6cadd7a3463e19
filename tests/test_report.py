"""The report that every reply ends with."""

from mlxquant.machine import chips
from mlxquant.runtime import speed


def make(**changes):
    values = dict(prompt_tokens=100, cached_tokens=0, generation_tokens=21, ttft_s=0.5,
                  decode_s=2.0, bytes_per_token=2_000_000_000, peak_bytes=3_000_000_000)
    return speed.make(**values | changes)


def test_report_arithmetic():
    result = make()
    assert (result.prompt_tps, result.generation_tps, result.gb_per_s) == (200, 10, 20)
    assert (result.percent_of_ceiling, result.ceiling_source) == (20, "probe")
    assert result.line() == (
        "prompt 100 tokens at 200.0 tokens/s · reply 21 tokens at 10.0 tokens/s · "
        "2.000 GB/token, 20.0 GB/s = 20 % of 100.0 GB/s measured here · peak 3.00 GB")


def test_a_line_of_guesses_with_and_without_a_known_speed():
    assert ("reply 21 tokens, 4 guessed right, at 10.0 tokens/s"
            in make(guessed_tokens=4).line())
    assert ("reply 5 tokens, 4 guessed right · peak"
            in make(guessed_tokens=4, generation_tokens=5, passes=1).line())


def test_a_mac_shows_its_headline_too(monkeypatch):
    monkeypatch.setattr(chips, "detect", lambda: chips.Chip("Apple M1 Pro", 14, 200))
    assert "20 % of 100.0 GB/s measured here, 10 % of 200 GB/s stated" in make().line()
    assert "(+50 cached)" in make(cached_tokens=50).line()
