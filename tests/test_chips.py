"""Chips are known by name and core count, and never guessed."""

import pytest

from mlxquant import MlxquantError
from mlxquant.machine import chips, identity, system

# What `ioreg -rc AGXAccelerator -d1` printed, shortened.
REGISTRY = {
    "M1 Max": """+-o AGXAcceleratorG13X  <class AGXAcceleratorG13X, id 0x100000a90>
    {
      "vendor-id" = <6b100000>
      "MetalPluginName" = "AGXMetalG13X"
      "IONameMatched" = "gpu,t6000"
      "PerformanceStatistics" = {"In use system memory (driver)"=0,"Device Utilization %"=25}
      "model" = "Apple M1 Max"
      "gpu-core-count" = 32
      "IOClass" = "AGXAcceleratorG13X"
    }
""",
    "M1 Pro": """+-o AGXAcceleratorG13X  <class AGXAcceleratorG13X, id 0x100000971>
    {
      "IOMatchedAtBoot" = Yes
      "vendor-id" = <6b100000>
      "AGCInfo" = {"fLastSubmissionPID"=615,"fSubmissionsSinceLastCheck"=0,"fBusyCount"=0}
      "PerformanceStatistics" = {"In use system memory (driver)"=0,"Device Utilization %"=22}
      "gpu-core-count" = 14
      "IOClass" = "AGXAcceleratorG13X"
    }
""",
    "M4": """+-o AGXAcceleratorG16G  <class AGXAcceleratorG16G, id 0x10000039c>
    {
      "IOMatchedAtBoot" = Yes
      "model" = "Apple M4"
      "gpu-core-count" = 10
    }
""",
    "old": '"GPUConfigurationVariable" = {"num_gps"=4,"gpu_gen"=13,"num_cores"=14,"num_mgpus"=1}',
    "none": "",
}


@pytest.mark.parametrize("brand, registry, label, bandwidth", [
    ("Apple M1 Max", "M1 Max", "M1 Max 32c", 400), ("Apple M1 Pro", "M1 Pro", "M1 Pro 14c", 200),
    ("Apple M1 Pro", "old", "M1 Pro 14c", 200), ("Apple M4", "M4", "M4 10c", 120),
    ("Apple M1 Ultra", '"gpu-core-count" = 48', "M1 Ultra 48c", 800),
    ("Apple M2 Ultra", '"gpu-core-count" = 76', "M2 Ultra 76c", 800),
    ("Apple M3 Max", '"gpu-core-count" = 30', "M3 Max 30c", 300),
    ("Apple M3 Max", '"gpu-core-count" = 40', "M3 Max 40c", 400),
    ("Apple M4 Max", "none", "M4 Max", None), ("Apple M2 Pro", "none", "M2 Pro", 200),
    ("Apple M1 (Virtual)", "none", "M1 (Virtual)", None),
    ("Apple Paravirtual device", "none", "Paravirtual device", None),
    ("Apple A18 Pro", '"gpu-core-count" = 5', "A18 Pro 5c", None),
    ("Apple M9 Max", '"gpu-core-count" = 44', "M9 Max 44c", None),
    ("Apple M3 Max", '"gpu-core-count" = 44', "M3 Max 44c", None)])
def test_a_mac_is_recognised_from_its_own_words(monkeypatch, brand, registry, label, bandwidth):
    answers = {"sysctl": brand, "ioreg": REGISTRY.get(registry, registry)}
    monkeypatch.setattr(chips.sys, "platform", "darwin")
    monkeypatch.setattr(chips, "output_of", lambda command, *_: answers[command])
    chip = chips.detect.__wrapped__()
    assert (chip.label, chip.headline_gb_per_s) == (label, bandwidth)
    figures = ("headline_gb_per_s", "fp32_tflops", "clock_ghz", "max_memory_gb", "slc_mb")
    assert set(chip.sources) == {key for key in figures if getattr(chip, key) is not None}


def test_a_mac_that_answers_nothing(monkeypatch):
    monkeypatch.setattr(chips.sys, "platform", "darwin")
    monkeypatch.setattr(chips, "output_of", lambda *_: "")
    chip = chips.detect.__wrapped__()
    assert chip.headline_gb_per_s is None and chip.gpu_cores is None and chip.name


@pytest.mark.parametrize("name, bandwidth", [
    ("NVIDIA H100 80GB HBM3", 3350), ("NVIDIA H200", 4800), ("NVIDIA H100 PCIe", None),
    ("AMD EPYC", None)])
def test_other_machines(monkeypatch, name, bandwidth):
    import mlx.core as mx

    monkeypatch.setattr(chips.sys, "platform", "linux")
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": name})
    assert chips.detect.__wrapped__().headline_gb_per_s == bandwidth


def test_every_figure_has_a_known_mark_and_the_fp32_rate_follows_from_cores():
    known = chips.every()
    assert len(known) == len({chip.label for chip in known})
    for chip in known:
        assert set(chip.sources.values()) <= set(chips.MARKS)
        if chip.gpu_cores:
            assert chip.fp32_tflops == pytest.approx(2e-12 * chip.lane_operations_per_s)
    stated = {("M1 Pro", 14): 4.64, ("M2 Ultra", 76): 27.2, ("M3 Max", 40): 14.1,
              ("M5 Max", 40): 16.9}
    for (name, cores), tflops in stated.items():
        assert chips.of(f"Apple {name}", cores).fp32_tflops == pytest.approx(tflops, rel=0.01)


@pytest.mark.parametrize("text, label", [
    ("M1 Pro", "M1 Pro 16c"), ("apple m1 pro 14c", "M1 Pro 14c"), ("M3 Max 30-core", "M3 Max 30c"),
    ("M4 Max, 32 cores", "M4 Max 32c"), ("h100", "NVIDIA H100 80GB HBM3"), ("M5", "M5 10c")])
def test_chips_are_found_as_people_write_them(text, label):
    assert chips.find(text).label == label


@pytest.mark.parametrize("text, says", [
    ("M1 Por", "near it are .*m1 pro"), ("M3 Max 44c", "allowed are M3 Max 30c, M3 Max 40c"),
    ("", "no chip ''")])
def test_what_is_not_in_the_table_is_refused(text, says):
    with pytest.raises(MlxquantError, match=says):
        chips.find(text)


def test_power_state_of_a_mac():
    battery = ("Now drawing from 'Battery Power'\n"
               " -InternalBattery-0 (id=1234)\t81%; discharging; 5:01 remaining")
    settings = ("System-wide power settings:\nCurrently in use:\n standby              1\n"
                " lowpowermode         1\n")
    thermal = ("No thermal warning level has been recorded\nCPU_Scheduler_Limit \t= 100\n"
               "CPU_Speed_Limit \t= 87\n")
    assert system._mac_power(battery, settings, thermal) == {
        "source": "battery", "low_power_mode": True, "cpu_speed_limit_percent": 87,
        "gpu_power_limit_w": None}
    assert set(system._mac_power("", "", "").values()) == {None}
    assert system._mac_power("Now drawing from 'AC Power'", "", "")["source"] == "mains"


def test_this_machine_says_what_a_result_needs():
    known = {"chip", "gpu_cores", "device", "memory_gb", "mlx", "mlx_lm",
             "gpu_architecture_override"}
    assert known <= set(identity.machine())
    assert set(system.power_state()) == {*system._mac_power("", "", ""), "load_average"}
    assert system.output_of("no-such-command-anywhere") == ""
