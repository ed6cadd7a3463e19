"""Predictions of other chips: the seed example, the back-test, the lane-operations."""

import statistics

import pytest

from mlxquant import MlxquantError
from mlxquant.cli.quantize import _free_group, _warn_of_slow_replicas
from mlxquant.codes.spec import Spec
from mlxquant.codes.width import Width
from mlxquant.machine import chips
from mlxquant.machine.replica_limits import ReplicaLimits
from mlxquant.report import lanes, predict
from mlxquant.runtime import probe

M1_PRO = chips.find("M1 Pro")


def test_the_seed_example():
    found = predict.predict(M1_PRO, bytes_per_token=64e9, total_bytes=64e9, layers=64)
    assert found.ceiling_tps == pytest.approx(3.125)
    assert found.low < 2.7 < found.tps < found.high < found.ceiling_tps
    assert "does not fit: 32 GB" in found.line() and found.line().startswith("predicted 2.8")
    assert found.percent_of_headline == pytest.approx(100 * found.tps / 3.125)


def test_what_fits_and_what_is_not_known():
    values = dict(bytes_per_token=2e10, layers=32)
    assert predict.predict(M1_PRO, total_bytes=22.8e9, **values).fits
    assert not predict.predict(M1_PRO, total_bytes=23.0e9, **values).fits
    unknown = predict.predict(chips.find("M5 Max 32c"), total_bytes=1, **values)
    assert unknown.fits is None and "largest memory not known" in unknown.line()


@pytest.mark.parametrize("chip", [chips.find("H100"), chips.Chip("Apple M9", 10),
                                  chips.Chip("AMD EPYC")])
def test_chips_that_no_measurement_covers_are_refused(chip):
    with pytest.raises(MlxquantError, match="no published measurements"):
        predict.predict(chip, bytes_per_token=1e9, total_bytes=1e9, layers=1)


def test_learning_finds_the_numbers_that_rows_were_made_from():
    rows = []
    for engine, layer_ms in (("llama.cpp", 0.2), ("mlx-lm", 0.05)):
        for layers, size in ((32, 4.0), (40, 9.0), (80, 30.0)):
            ms = layers * layer_ms + 1.1 * size / 200 * 1e3
            rows.append(dict(chip="Apple M1 Pro", gpu_cores=14, engine=engine, layers=layers,
                             gb_per_token=size, tokens_per_s=1e3 / ms, bits=4))
    learnt = predict.learn(rows)
    assert learnt.ms_per_layer == pytest.approx({"llama.cpp": 0.2, "mlx-lm": 0.05})
    assert learnt.bytes_factor == pytest.approx(1.1)


def test_the_back_test_leaves_the_chip_out(monkeypatch):
    """Runs of an M1 Pro that are ten times too fast must not change what is predicted for it."""
    before = {(r["chip"], r["gpu_cores"], r["format"]): r["predicted"] for r in predict.backtest()}
    table = lanes.published()
    wrong = [r | {"tokens_per_s": r["tokens_per_s"] * (10 if r["chip"] == "Apple M1 Pro" else 1)}
             for r in table["decode"]]
    monkeypatch.setattr(lanes, "published", lambda: table | {"decode": wrong})
    after = {(r["chip"], r["gpu_cores"], r["format"]): r["predicted"]
             for r in predict.backtest.__wrapped__()}
    for key, value in before.items():
        assert (after[key] == value) == (key[0] == "Apple M1 Pro")


def test_the_errors_of_the_back_test():
    rows, summary = predict.backtest(), {row["chips"]: row for row in predict.backtest_summary()}
    assert set(summary) == {"base", "Pro", "Max", "Ultra", "llama.cpp", "mlx-lm", "all"}
    assert summary["all"]["runs"] == len(rows) == len(lanes.published()["decode"])
    assert summary["all"]["median_error"] < 0.05 and abs(summary["all"]["worst_error"]) < 0.3
    inside = [abs(r["error"]) <= predict.error_band(chips.of(r["chip"], r["gpu_cores"]))
              for r in rows]
    assert 0.85 < statistics.mean(inside) < 0.95


def test_every_published_row_says_where_it_is_from():
    from mlxquant.machine.chips import MARKS

    for row in [*lanes.published()["decode"], *lanes.published()["matvec"]]:
        assert row["source"] and row["mark"] in MARKS
        assert chips.of(row["chip"], row["gpu_cores"]).headline_gb_per_s


def test_lane_operations_by_hand():
    """An M4 Pro has 20 · 128 · 1.578e9 lane-operations a second; a stock 2-bit weight waits for 5
    of them."""
    chip = chips.find("M4 Pro")
    assert chip.lane_operations_per_s == pytest.approx(4.03968e12)
    assert lanes.stock(2).on(chip) == 5
    assert lanes.stock(2).on(M1_PRO) == pytest.approx(5 + 1 + 0.45 + 0.25)
    assert lanes.seconds(chip, 1e9, 1, lanes.stock(2)) == pytest.approx(5e9 / 4.03968e12)
    assert lanes.seconds(chip, 1, 273e9, lanes.stock(2)) == pytest.approx(1 / 0.92)
    assert lanes.replicated(2, 8, 16).on(chip) == pytest.approx(
        1 + 1 / 16 + 9 / 16 + 0.9 * (4 + 4 / 16 + 32 / 16) / 8)
    assert lanes.replicated(2, 8).on(chip) == pytest.approx(8 * 33 / 32 * 1.9)


def test_lane_operations_against_published_products():
    errors = [abs(row["error"]) for row in lanes.check()]
    assert statistics.median(errors) < 0.1 and max(errors) < 0.2
    unfitted = [abs(r["error"]) for r in lanes.check() if "M3" in r["chip"] or r["vectors"] == 1]
    assert len(unfitted) == 6 and max(unfitted) < 0.1
    assert "16 published times" in lanes.check_line()


def test_more_arithmetic_frees_more_replicas():
    most = [lanes.free_replicas(chips.find(f"M4 Pro {cores}c"), 4)[0] for cores in (16, 20)]
    assert most[0] <= most[1]
    with pytest.raises(MlxquantError, match="not in the table"):
        lanes.free_replicas(chips.Chip("Apple M9", 10), 2)


def test_low_bits_can_be_bound_by_arithmetic():
    weights = 6.6e9
    found = predict.predict(M1_PRO, bytes_per_token=2.1e9, total_bytes=2.1e9, layers=32,
                            weights=weights, cost=lanes.stock(2))
    assert found.bound_by == "arithmetic" and found.tps < 1e9 * 200 / 2.1e9


def test_a_named_chip_gets_the_smallest_free_group():
    assert [_free_group(None, "2", 4), _free_group("M3 Max", "4", 4)] == [0, 0]
    assert _free_group("M1 Pro", "2", 4) == _free_group("M1 Pro", "2", 3) == 16
    with pytest.raises(MlxquantError, match="8 replicas of 1 bits cost time on M1 Pro 16c"):
        _free_group("M1 Pro", "1", 8)
    with pytest.raises(MlxquantError, match="not in the table"):
        _free_group("H100", "2", 4)


@pytest.mark.parametrize("chip, measured, said", [
    ("M1 Pro", None, "4 replicas are slower than one on this machine, by prediction; --for-chip "
     "'M1 Pro 16c' looks for groups that are not"),
    ("M3 Max", {"2": 1}, "as measured here; `mlxquant probe` shows"),  # predicted to be free
    ("H100", {"2": 1}, "as measured here; `mlxquant probe` shows"),  # which --for-chip refuses
    ("M1 Pro", {"2": 4}, None), ("M1 Pro", {"2": None}, "by prediction"), ("H100", None, None)])
def test_replicas_that_cost_time_here_are_remarked_on(monkeypatch, capsys, chip, measured, said):
    limits = measured and ReplicaLimits(None, measured, {
        "2": {"4": 0 if measured["2"] == 4 else None}})
    monkeypatch.setattr(probe, "replica_limits", lambda: limits)
    monkeypatch.setattr(chips, "detect", lambda: chips.find(chip))
    _warn_of_slow_replicas(Spec(Width.of(2), method="replica", replicas=4))
    err = capsys.readouterr().err
    assert said in " ".join(err.split()) if said else not err
