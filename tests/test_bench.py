"""What bench measures, how it is written, and that nothing measured is lost."""

import csv
import json
from dataclasses import asdict, replace

import commands
import pytest
from conftest import CONFIG, replicated

import mlxquant
from mlxquant import MlxquantError
from mlxquant.codes.spec import ReplicaShape
from mlxquant.layers import traffic
from mlxquant.layers.pack import pack
from mlxquant.machine import chips
from mlxquant.report import bench, bench_output
from mlxquant.runtime import probe

KEYS = ["model", "test", "tps_mean", "tps_stdev", "ttft_ms", "bytes_per_token", "gb_per_s",
        "headline_gb_per_s", "probe_gb_per_s", "percent_of_headline", "percent_of_probe",
        "fixed_ms_per_token", "peak_memory_gb", "chip", "gpu_cores", "mlx", "mlx_lm", "device",
        "repetitions", "machine", "power"]


@pytest.fixture(scope="module")
def records(tiny_folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "measured", commands.measured)
        return mlxquant.bench([str(tiny_folder)], prompt=16, generated=6, depths=(0, 40),
                              batches=(1, 3), repetitions=2)


def test_every_test_is_measured(records):
    assert [r.test for r in records] == ["pp16", "tg6", "pp16 @ d40", "tg6 @ d40", "pp16 b3",
                                         "tg6 b3", "pp16 @ d40 b3", "tg6 @ d40 b3"]
    for record in records:
        assert set(KEYS) <= set(asdict(record))
        assert record.tps_mean > 0 and record.tps_stdev >= 0 and record.repetitions == 2
        assert record.gb_per_s == pytest.approx(record.tps_mean * record.bytes_per_token / 1e9)
        assert record.percent_of_probe == pytest.approx(record.gb_per_s)
        assert record.peak_memory_gb > 0 and record.machine["mlx"] == record.mlx


def test_the_first_token_belongs_to_the_prompt(records):
    prompt, reply, _, deep = records[:4]
    # The mean of times is at least the tokens by the mean of rates, however they scatter.
    assert prompt.ttft_ms >= 16e3 / prompt.tps_mean * (1 - 1e-9)
    assert reply.ttft_ms is None
    assert deep.ttft_ms > 0


def test_bytes_of_a_token_are_weights_and_the_keys_and_values_read(records, tiny):
    one = 2 * CONFIG["num_hidden_layers"] * CONFIG["num_key_value_heads"] * CONFIG["head_dim"] * 4
    by_test = {r.test: r.bytes_per_token for r in records}
    weights = tiny.weight_bytes_per_token
    assert by_test["tg6 @ d40"] - by_test["tg6"] == 40 * one
    assert by_test["tg6"] == pytest.approx(weights + 3.5 * one, abs=one)
    assert by_test["tg6 b3"] == pytest.approx(weights / 3 + 3.5 * one, abs=one)
    assert by_test["pp16"] < weights / 6


@pytest.mark.parametrize("packed", [False, True])
def test_a_prompt_takes_one_multiply_add_for_a_weight_however_many_replicas(tiny, packed):
    """Its codes are expanded once; a token by itself takes one for each replica."""
    network = replicated(CONFIG, ReplicaShape(2, 4))
    network = pack(network) if packed else network
    model = replace(tiny, network=network)
    one, few, many = (bench._Runner(model, bench.Test(*test)).operations_per_token()
                      for test in (("tg", 8), ("pp", 8), ("pp", 512)))
    head = 2 * CONFIG["vocab_size"] * CONFIG["hidden_size"]
    assert few == one - head * (1 - 1 / 8)
    body = 2 * sum(map(traffic.weight_count, network.modules())) - head
    assert many == pytest.approx(body + head / 512, rel=0.1) and one > 3 * body


def test_the_cache_is_cut_back_between_repetitions(tiny):
    runner = bench._Runner(tiny, bench.Test("tg", 5, depth=20))
    assert len(list(runner.times(3))) == 3
    first = runner.kv
    assert list(runner.times(1)) and runner.kv == first  # not a token more than before


def test_all_sequences_of_a_batch_are_run(tiny):
    runner = bench._Runner(tiny, bench.Test("tg", 3, batch=4))
    list(runner.times(1))
    assert runner.cache[0].keys.shape[0] == 4


@pytest.mark.parametrize("values, says", [
    (dict(prompt=0, generated=0), "at least one test"), (dict(repetitions=0), "one repetition"),
    (dict(depths=(-1,)), "depth is -1"), (dict(batches=(0,)), "batch is 0"),
    (dict(prompt=-1), "tokens is -1")])
def test_what_makes_no_sense_is_refused(tiny_folder, values, says):
    with pytest.raises(MlxquantError, match=says):
        mlxquant.bench([str(tiny_folder)], **values)


def synthetic(model="a", depth=0, gigabytes=1.0, fixed=2.0, rate=100.0, **changes):
    ms = fixed + 1e3 * gigabytes / rate
    values = dict(
        model=model, test=f"tg128 @ d{depth}" if depth else "tg128", depth=depth, batch=1,
        tps_mean=1e3 / ms, tps_stdev=1.5, ttft_ms=None, bytes_per_token=1e9 * gigabytes,
        operations_per_byte=2.0, gb_per_s=1e3 / ms * gigabytes, headline_gb_per_s=200.0,
        probe_gb_per_s=160.0, percent_of_headline=50.0, percent_of_probe=62.5,
        fixed_ms_per_token=None, marginal_gb_per_s=None, fit_residual_ms=None, fit_over=None,
        parameters=2_000_000_000, weight_gb=gigabytes, peak_memory_gb=gigabytes + 0.5,
        chip="Apple M1 Pro", gpu_cores=16, mlx="0.32.4", mlx_lm="0.32.2", device="gpu",
        repetitions=5, machine={"chip": "Apple M1 Pro", "cores": 10},
        power={"source": "mains", "low_power_mode": False})
    return bench.Record(**values | changes)


def test_the_split_over_models():
    records = [synthetic(name, gigabytes=size) for name, size in (("a", 1), ("b", 2), ("c", 4))]
    prompt = replace(records[0], test="pp512")
    fitted = bench.with_fit([*records, prompt])
    assert [r.fit_over for r in fitted] == ["models"] * 3 + [None]
    assert fitted[0].fixed_ms_per_token == pytest.approx(2)
    assert fitted[0].marginal_gb_per_s == pytest.approx(100)
    assert all(abs(r.fit_residual_ms) < 1e-9 for r in fitted[:3])


def test_the_split_over_depths_and_where_there_is_none():
    deep = [synthetic("a", depth, 1 + depth / 1e4) for depth in (0, 4096, 8192)]
    assert {r.fit_over for r in bench.with_fit(deep)} == {"depths"}
    assert {r.fixed_ms_per_token for r in bench.with_fit(deep[:2])} == {None}


MARKDOWN = """\
| model | weights GB | params | device | test | tokens/s | MB/token | GB/s | of headline \
| of measured | fixed ms/token | margin GB/s | peak GB |
| --- | --: | --: | --- | --- | --: | --: | --: | --: | --: | --: | --: | --: |
| a | 1.000 | 2.00 B | gpu | tg128 | 83.33 ± 1.50 | 1,000.0 | 83.3 | 50 % | 62 % \
| 2.00 | 100 | 1.50 |
| b | 2.000 | 2.00 B | gpu | tg128 | 45.45 ± 1.50 | 2,000.0 | 90.9 | 50 % | 62 % \
| 2.00 | 100 | 2.50 |
| c | 4.000 | 2.00 B | gpu | tg128 | 23.81 ± 1.50 | 4,000.0 | 95.2 | 50 % | 62 % \
| 2.00 | 100 | 4.50 |

Apple M1 Pro (gpu, 16 GPU cores), MLX 0.32.4, mlx-lm 0.32.2; 160.0 GB/s measured, \
200 GB/s stated; 5 repetitions
Over models: 2.00 ± 0.00 ms fixed per token + bytes at 100.0 ± 0.0 GB/s \
(3 points, largest residual 0.000 ms)"""


def test_formats():
    records = bench.with_fit([synthetic(name, gigabytes=size)
                              for name, size in (("a", 1), ("b", 2), ("c", 4))])
    assert bench_output.markdown(records) == MARKDOWN
    dictionaries = [asdict(r) for r in records]
    assert json.loads(bench_output.as_json(records)) == dictionaries
    assert ([json.loads(line) for line in bench_output.json_lines(records).splitlines()]
            == dictionaries)
    rows = list(csv.DictReader(bench_output.comma_separated(records).splitlines()))
    assert [row["model"] for row in rows] == ["a", "b", "c"] and rows[0]["machine_cores"] == "10"
    assert rows[0]["ttft_ms"] == "" and float(rows[2]["bytes_per_token"]) == 4e9
    assert rows[0]["power_source"] == "mains"
    assert [form([]) for form in bench_output.FORMATS.values()] == ["", "[]", "", ""]


def test_a_mixtures_active_parameters_have_a_column():
    for active, shown in ((300_000_000, True), (2_000_000_000, False), (None, False)):
        table = bench_output.markdown([synthetic(active_parameters=active)])
        assert ("| active |" in table) == ("300.0 M" in table) == shown


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_roofline_is_drawn(tmp_path, ending):
    records = [synthetic("a"), synthetic("b", gigabytes=2, test="pp512", operations_per_byte=300.0)]
    bench_output.plot(records, chips.find("M1 Pro"), 4.0, tmp_path / f"roof.{ending}")
    text = (tmp_path / f"roof.{ending}").read_bytes()
    assert text.startswith({"png": b"\x89PNG", "svg": b"<?xml"}[ending]) and len(text) > 5000


def test_interrupted_keeps_what_was_measured(tiny_folder, tmp_path, monkeypatch, capsys):
    from mlxquant.cli import measure

    class Interrupting(bench._Runner):
        def times(self, repetitions):
            if self.test.kind == "tg":
                raise KeyboardInterrupt
            return super().times(repetitions)

    monkeypatch.setattr(bench, "_Runner", Interrupting)
    with pytest.raises(KeyboardInterrupt):
        measure.bench(None, [str(tiny_folder)], prompt=8, generated=4, repetitions=1, depth=None,
                      batch=None, form="json", output=tmp_path / "out.json", plot=None, chip=None,
                      memory=None)
    assert [r["test"] for r in json.loads((tmp_path / "out.json").read_text())] == ["pp8"]
    assert "| pp8 |" in capsys.readouterr().out
