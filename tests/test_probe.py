"""The ceiling probe and the timing of replicated layers."""

import json

import mlx.core as mx
import pytest
from typer.testing import CliRunner

import mlxquant
from mlxquant.cli import app
from mlxquant.codes.spec import ReplicaShape
from mlxquant.kernels import gpu_clock
from mlxquant.machine import replica_limits
from mlxquant.runtime import probe, replica_probe, speed


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setenv("MLXQUANT_CACHE", str(tmp_path))
    monkeypatch.setattr(probe, "_ROWS", (64, 64))
    monkeypatch.setattr(probe, "_product_tflops", lambda: 0.1)
    return tmp_path


def test_probe_measures_once_and_is_cached(small, capsys):
    first = probe.measured().ceiling
    assert first.gb_per_s > 0 and first.spread >= 0 and first.mlx == mx.__version__
    assert probe.measured().ceiling == first
    assert capsys.readouterr().err.count("Measuring") == 1
    assert probe.measured(refresh=True).ceiling.kernel


@pytest.fixture
def finds(small, monkeypatch):
    """Has the readers find these rates, one each time; gives those that are left."""
    def install(*rates):
        left = list(rates)
        monkeypatch.setattr(probe, "_measure", lambda: probe.Probe(
            probe.Ceiling(left.pop(0), 0.0, "r", "c", "m"), {}, 0.1))
        return left
    return install


def _report(gb_per_s):
    return speed.make(prompt_tokens=1, cached_tokens=0, generation_tokens=2, ttft_s=1.0,
                      decode_s=1.0, bytes_per_token=round(gb_per_s * 1e9), peak_bytes=0)


def test_a_run_that_beats_the_ceiling_has_it_measured_again(finds, capsys):
    left = finds(16.8, 40.0, 20.0)
    assert _report(10.5).percent_of_ceiling == 62.5 and len(left) == 2
    assert _report(36.2).percent_of_ceiling == pytest.approx(90.5)
    assert "36.2 GB/s is more than the 16.8 GB/s" in capsys.readouterr().err
    probe._known.clear()  # as in a process that comes later
    assert _report(10.0).percent_of_ceiling == 25 and len(left) == 1
    for rate in (50.0, 50.0, 49.0):  # of a model in a cache: once, and the larger value stays
        assert _report(rate).ceiling_gb_per_s == 40 and not left


def test_the_ceiling_is_not_measured_again_where_memory_is_short(finds, monkeypatch):
    left = finds(16.8, 40.0)
    monkeypatch.setattr(probe, "memory_limit", lambda: 1)
    assert _report(36.2).ceiling_gb_per_s == 16.8 and left == [40.0]


def test_all_of_a_bench_stand_beside_one_ceiling(finds, tiny):
    finds(1e-9, 1000.0)
    told = []
    mlxquant.bench([lambda: tiny], prompt=4, generated=4, repetitions=1, on_record=told.append)
    for record in told[-1]:
        assert record.probe_gb_per_s == 1000
        assert record.percent_of_probe == pytest.approx(record.gb_per_s / 10)


@pytest.mark.parametrize("content", ['{"gb_per_s"', '{"gb_per_s": 5, "spread": 0}', "[]",
                                     '{"ceiling": {}}'])
def test_probe_survives_a_broken_or_older_cache(small, content):
    probe.measured()
    file = next((small / "probe").glob("*.json"))
    file.write_text(content)
    probe._known.clear()  # as in a process that comes later
    assert probe.measured().ceiling.gb_per_s > 0
    assert json.loads(file.read_text())["ceiling"]["gb_per_s"] > 0


def test_a_cache_that_cannot_be_written_stops_nothing(small, monkeypatch, capsys):
    (small / "file").write_text("where a folder should be")
    monkeypatch.setenv("MLXQUANT_CACHE", str(small / "file"))
    first = probe.measured().ceiling
    said = capsys.readouterr().err
    assert "cannot write" in said and "measured again next time" in said
    assert probe.measured().ceiling is first and capsys.readouterr().err == ""


def test_the_file_is_read_once(small, monkeypatch):
    probe.measured()
    probe._known.clear()
    probe.measured()
    monkeypatch.setattr(probe.json, "loads", lambda text: 1 / 0)
    assert probe.measured().ceiling.gb_per_s > 0


def test_the_ceiling_is_the_best_reader(small):
    found = probe.measured()
    fastest = max(found.readers.values())
    assert found.ceiling.gb_per_s == fastest == found.readers[found.ceiling.kernel]
    assert {"mlx reduction", "mlx product"} <= set(found.readers)


def test_the_verb_prints_all_of_it(small):
    value = json.loads(CliRunner().invoke(app, ["probe", "--json"]).stdout)
    assert value["ceiling"]["gb_per_s"] > 0 and value["readers"] and value["replicas"]["reason"]


def test_probe_reads_more_than_any_cache_holds():
    assert probe._MATRICES * min(probe._ROWS) * probe._COLUMNS * 4 >= 1 << 30


def test_a_plain_cpu_says_why_it_has_no_limits(small):
    assert probe.replica_limits() is None
    assert "dense" in probe.measured(replicas=True).replicas.reason
    limits = probe.replica_limits()
    assert limits.largest_replicas is None and limits.group_for(2, 4) is None


@pytest.mark.parametrize("cost, largest, groups", [
    (lambda k, g: 1.0, 16, {"2": 0, "4": 0, "8": 0, "16": 0}),
    (lambda k, g: k, 1, {"2": None, "4": None, "8": None, "16": None}),
    (lambda k, g: max(1, (k if not g else 1 + k / g) / 4), 4, {"2": 0, "4": 0, "8": 8, "16": 8}),
    (lambda k, g: 1 + (k if not g else k / g) / 20, 1, {"2": 8, "4": 8, "8": 8, "16": 16})])
def test_the_search_finds_what_is_free(cost, largest, groups):
    assert replica_limits.search(1.0, cost) == (largest, groups)


def test_the_search_stops_at_the_first_that_is_not_free():
    asked = []
    replica_limits.search(1.0, lambda k, g: asked.append((k, g)) or 2.0)
    assert asked == [(2, 0), (2, 64), (4, 64), (8, 64), (16, 64)]


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(replica_probe, "device", lambda: "gpu")

    def install(rate):
        def timed(shape, size):
            cost = shape.replicas / (shape.replica_group or 1)
            return shape.as_dict() | {"microseconds": 10 + cost, "gb_per_s": rate(shape.bits.value)}
        monkeypatch.setattr(replica_probe, "time_layers", timed)
    return install


def test_limits_of_a_gpu_and_the_way_through_the_cache(small, on_a_gpu):
    on_a_gpu(lambda bits: 1e6)
    limits = probe.measured(replicas=True).replicas
    assert limits.reason is None and set(limits.largest_replicas) == {"1", "ternary", "2", "3", "4"}
    groups = [limits.group_for(2, 1), limits.group_for(2, 16), limits.group_for(8, 2)]
    assert groups == [0, 16, None]
    assert probe.replica_limits() == limits
    shapes = [(2, 16, 16), (2, 16, 8), (2, 16, 0), (2, 1, 0), (8, 2, 0)]
    assert [limits.free(*shape) for shape in shapes] == [True, False, False, True, None]


def test_layers_without_a_kernel_give_no_limits(on_a_gpu):
    on_a_gpu(lambda bits: 10 if bits == 3 else 90)
    limits = replica_probe.measure_replicas(100)
    assert limits.largest_replicas["3"] is None and limits.largest_replicas["2"] == 1
    assert "3 (10 GB/s) bits: there it is not reading" in limits.reason


@pytest.mark.parametrize("shape", [ReplicaShape(2, 4), ReplicaShape("ternary", 2),
                                   ReplicaShape(4, 8, 16)])
def test_layers_are_timed_through_their_call(monkeypatch, shape):
    monkeypatch.setattr(replica_probe, "_LEAST_BYTES", 0)
    monkeypatch.setattr(replica_probe, "_CALLS", 8)
    result = replica_probe.time_layers(shape, (192, 64), mx.float32)
    assert result["microseconds"] > 0 and result["gb_per_s"] > 0 and result["layers"] == 8
    layer = replica_probe._layer(shape, 512, 512, mx.float32)
    x = mx.random.normal((1, 512))
    assert 0.5 < (mx.linalg.norm(layer(x)) / mx.linalg.norm(x)).item() < 2


def test_a_steps_time_is_that_of_a_step(monkeypatch):
    """Off CUDA a difference of two runs: of steps that do nothing next to nothing, of slow ones
    their time."""
    monkeypatch.setattr(gpu_clock.time, "perf_counter", lambda: clock[0])
    clock, counts = [0.0], []

    def run(count, zero):
        counts.append(count)
        return [Advance(clock, 5.0 + 0.25 * count)]

    monkeypatch.setattr(gpu_clock.mx, "eval", lambda outputs: [output() for output in outputs])
    monkeypatch.setattr(gpu_clock, "_square", lambda: mx.zeros((1, 1)))
    assert gpu_clock.seconds_per_step(run, 8, repeats=3) == [0.25] * 3
    assert counts == [16, 8] * 4  # a pass that does not count, then three


class Advance:
    """In the place of an array: its evaluation takes so many seconds."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds = clock, seconds

    def __call__(self):
        self.clock[0] += self.seconds


@pytest.mark.parametrize("queueing, refused",
                         [([3.0] + [0.01] * 3, False), ([0.01, 3.0, 0.01, 3.0], True)])
def test_a_clock_read_before_all_was_queued_counts_for_nothing(monkeypatch, queueing, refused):
    """Only the pass that does not count, which compiles, may take longer than the GPU waits."""
    clock, queueing = [0.0], list(queueing)
    stamps = iter([mx.array([100, 0]), mx.array([100 + 4_000_000, 0])] * 4)
    monkeypatch.setattr(gpu_clock.backend, "is_cuda", lambda: True)
    monkeypatch.setattr(gpu_clock, "_stamp", lambda *_: (next(stamps), None))
    monkeypatch.setattr(gpu_clock.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(gpu_clock.mx, "async_eval",
                        lambda *_: clock.__setitem__(0, clock[0] + queueing.pop(0)))
    if refused:
        with pytest.raises(RuntimeError, match="queueing took 3.000 s"):
            gpu_clock.seconds_per_step(lambda *_: [], 4, repeats=3)
    else:
        assert gpu_clock.seconds_per_step(lambda *_: [], 4, repeats=3) == pytest.approx([0.001] * 3)
