"""The reading of a GPU's memory: without a driver, and with one that a test plays."""

from types import SimpleNamespace

import pynvml
import pytest

from service.gpu_memory import GpuMemory, GpuMemoryReader


class Driver:
    """Two GPUs; 100 times its number are used in each."""

    def __init__(self, monkeypatch):
        self.is_lost = False
        monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", {0: 0, 1: 1}.__getitem__)
        by_uuid = {"GPU-a": 0, "MIG-b": 1}.__getitem__
        monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", by_uuid)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", self._memory)

    def _memory(self, gpu):
        if self.is_lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return SimpleNamespace(used=100 * gpu, total=1000)


@pytest.fixture
def driver(monkeypatch):
    return Driver(monkeypatch)


@pytest.mark.parametrize(
    ("visible", "used"),
    [(None, 0), ("", 0), ("1", 100), ("1,0", 100), ("GPU-a", 0), ("MIG-b,GPU-a", 100)],
)
@pytest.mark.usefixtures("driver")
def test_the_gpu_is_the_first_that_cuda_shows(monkeypatch, visible, used):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert GpuMemoryReader().read() == GpuMemory(used=used, total=1000)


def test_a_gpu_that_is_lost_has_no_memory(driver):
    reader = GpuMemoryReader()
    driver.is_lost = True
    assert reader.read() is None


def test_without_a_driver_nothing_is_told(monkeypatch):
    def fail():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert GpuMemoryReader().read() is None
