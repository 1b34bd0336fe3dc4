"""Measure how well a fit uses its GPUs: utilisation, memory, power and time, from NVML (library: nvidia-ml-py).

Without NVML, a driver or a GPU there are no numbers, and nothing is said.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Self

log = logging.getLogger(__name__)


class Readings:
    """Reads the visible GPUs in the background while it is used as a context manager.

    :param every_s: time between two readings [seconds]; NVML's utilisation is that of up to a second before each.
    """

    def __init__(self, every_s: float = 1.0) -> None:
        self.every_s = every_s
        self._seconds = 0.0
        self._gpus = 0
        self._count: dict[str, int] = {}
        self._sum: dict[str, float] = {}
        self._most: dict[str, float] = {}
        self._over = threading.Event()

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        self._thread = threading.Thread(target=self._sample, name="gpu-readings", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=5.0)  # a driver that hangs must not delay the result
        self._seconds = time.monotonic() - self._started

    def metrics(self) -> dict[str, float]:
        """The numbers for the receipt, without those that a device does not measure; empty without a GPU.

        ``gpu_count``, ``gpu_seconds`` (wall time times GPUs), ``gpu_utilization_mean`` [percent of the time in which a
        kernel runs, mean over GPUs], ``gpu_memory_peak_mib`` (of the fullest GPU, with what other processes use),
        ``gpu_power_mean_w`` and ``gpu_energy_wh`` (of all GPUs together).
        """
        if not self._gpus:
            return {}
        found = {"gpu_count": float(self._gpus), "gpu_seconds": round(self._seconds * self._gpus, 1)}
        mean = {name: self._sum[name] / count for name, count in self._count.items()}
        if "utilization" in mean:
            found["gpu_utilization_mean"] = round(mean["utilization"], 1)
        if "memory" in mean:
            found["gpu_memory_peak_mib"] = round(self._most["memory"] / 2**20, 1)
        if "power" in mean:
            watts = mean["power"] / 1000
            found["gpu_power_mean_w"] = round(watts, 1)
            found["gpu_energy_wh"] = round(watts * self._seconds / 3600, 3)
        return found

    def _sample(self) -> None:
        try:
            with _nvml() as nvml:
                devices = _visible(nvml)
                self._gpus = len(devices)
                ask: dict[str, Callable[[], float]] = {
                    "utilization": lambda: (
                        sum(nvml.nvmlDeviceGetUtilizationRates(d).gpu for d in devices) / len(devices)
                    ),
                    "memory": lambda: max(nvml.nvmlDeviceGetMemoryInfo(d).used for d in devices),
                    "power": lambda: sum(nvml.nvmlDeviceGetPowerUsage(d) for d in devices),  # [mW]
                }
                over = not devices
                while not over:
                    over = self._over.wait(self.every_s)  # the last readings are taken at the end
                    for name, reading in list(ask.items()):
                        try:
                            self._take(name, float(reading()))
                        except nvml.NVMLError as error:
                            # A slice of a GPU (MIG), for one, has no utilisation of its own.
                            log.debug("NVML gives no %s: %s", name, error)
                            del ask[name]
        except Exception as error:  # noqa: BLE001  nothing may fail because GPUs cannot be read
            log.debug("no GPU readings: %s: %s", type(error).__name__, error)

    def _take(self, name: str, value: float) -> None:
        self._count[name] = self._count.get(name, 0) + 1
        self._sum[name] = self._sum.get(name, 0.0) + value
        self._most[name] = max(self._most.get(name, value), value)


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    nvml = importlib.import_module("pynvml")
    nvml.nvmlInit()
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def _visible(nvml: Any) -> list[Any]:
    """NVML's handles of the GPUs that CUDA may use, since NVML ignores ``CUDA_VISIBLE_DEVICES``.

    CUDA and NVML number the GPUs alike if all are of one kind, or with ``CUDA_DEVICE_ORDER=PCI_BUS_ID``.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    handles = []
    for name in (part.strip() for part in named.split(",")):
        if name.isdecimal():
            handles.append(nvml.nvmlDeviceGetHandleByIndex(int(name)))
        elif name.startswith(("GPU-", "MIG-")):
            handles.append(nvml.nvmlDeviceGetHandleByUUID(name))
        else:  # CUDA, too, ignores all names from the first invalid one on
            break
    return handles
