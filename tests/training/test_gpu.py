"""What is made of NVML's readings. A fake library stands in, with NVML's names and units: it shows the arithmetic, not a GPU."""
# ruff: noqa: N802  NVML's names

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lepton_airflow.training.gpu import Readings


class NVMLError(Exception):
    """As nvidia-ml-py raises."""


class FakeNvml:
    """Two GPUs whose readings change with every sample."""

    NVMLError = NVMLError

    def __init__(self, *, count: int = 2, lacks: str = "") -> None:
        self.count, self.lacks, self.open = count, lacks, 0
        self.samples = dict.fromkeys(range(4), 0)
        self.enough = threading.Event()

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return {"GPU-b": 1, "MIG-c": 2}[uuid]

    def nvmlDeviceGetUtilizationRates(self, device: int) -> Any:
        if self.lacks == "utilization":
            raise NVMLError("Not Supported")
        return SimpleNamespace(gpu=50 + 20 * device, memory=1)

    def nvmlDeviceGetMemoryInfo(self, device: int) -> Any:
        self.samples[device] += 1
        rising = {1: 10, 2: 300}.get(self.samples[device], 20)
        if all(n >= 3 for i, n in self.samples.items() if i < self.count):
            self.enough.set()
        return SimpleNamespace(used=rising * 2**20 * (device + 1), total=2**40)

    def nvmlDeviceGetPowerUsage(self, device: int) -> int:
        return 100_000 * (device + 1)  # milliwatts


@pytest.fixture(autouse=True)
def all_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def readings(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type]
    with Readings(every_s=0.001) as taken:
        assert not nvml.count or nvml.enough.wait(30)
    assert nvml.open == 0
    return taken.metrics()


def test_gpus_are_measured_in_the_units_that_the_names_say(monkeypatch: pytest.MonkeyPatch) -> None:
    found = readings(FakeNvml(), monkeypatch)
    assert found.pop("gpu_seconds") >= 0
    assert found.pop("gpu_energy_wh") >= 0
    assert found == {
        "gpu_count": 2,
        "gpu_utilization_mean": 60.0,
        "gpu_memory_peak_mib": 600.0,
        "gpu_power_mean_w": 300.0,
    }


def test_what_a_device_does_not_measure_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found = readings(FakeNvml(count=1, lacks="utilization"), monkeypatch)
    assert "gpu_utilization_mean" not in found
    assert found["gpu_power_mean_w"] == 100.0


@pytest.mark.parametrize(
    ("visible", "power"), [("1", 200.0), ("GPU-b", 200.0), ("0,1", 300.0), ("1,-1,0", 200.0)]
)
def test_only_the_gpus_that_cuda_may_use_count(
    monkeypatch: pytest.MonkeyPatch, visible: str, power: float
) -> None:
    nvml = FakeNvml()
    nvml.enough.set()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert readings(nvml, monkeypatch)["gpu_power_mean_w"] == power


def test_without_a_gpu_a_driver_or_the_library_there_is_nothing_and_no_noise(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert readings(FakeNvml(count=0), monkeypatch) == {}

    class NoDriver(FakeNvml):
        def nvmlInit(self) -> None:
            raise NVMLError("Driver Not Loaded")

    monkeypatch.setitem(sys.modules, "pynvml", NoDriver())  # type: ignore[arg-type]
    with Readings() as taken:
        pass
    assert taken.metrics() == {}
    monkeypatch.setitem(sys.modules, "pynvml", None)  # type: ignore[arg-type]
    with Readings() as taken:
        pass
    assert taken.metrics() == {}
    assert caplog.text == ""


BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_the_benchmark_is_ready_to_run() -> None:
    """Every number of it, on a CPU and tiny: what can be tried of the script where there is no GPU."""
    done = subprocess.run(
        [sys.executable, BENCHMARK, "--cpu-smoke"], check=False, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout.splitlines()[-1])
    assert {"small_ratio", "large_ratio", "large_of_matmul", "streamed_ratio", "checkpoint_stall_s"} <= set(
        numbers
    )
    assert numbers["syncs_per_step"] == 0
    assert numbers["resume_difference"] == 0  # exactly, on a CPU


def test_without_a_gpu_the_benchmark_says_so_in_a_sentence() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, BENCHMARK], check=False, capture_output=True, text=True)
    assert done.returncode == 99
    assert done.stdout == ""
    assert done.stderr.startswith("gpu: torch ")
    assert len(done.stderr.splitlines()) == 1
