"""The memory of the GPU that serves, as NVIDIA's management library tells it."""

import os
from typing import NamedTuple

import pynvml


class GpuMemory(NamedTuple):
    """Bytes of the whole GPU: what all its processes hold, and what it has."""

    used: int
    total: int


class GpuMemoryReader:
    """Asks the driver; the GPU is the first that CUDA shows this process."""

    def __init__(self) -> None:
        try:
            pynvml.nvmlInit()
            self._gpu = _first_visible(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
        except pynvml.NVMLError:
            self._gpu = None

    def read(self) -> GpuMemory | None:
        """Return what is held at present; None where the driver tells nothing of it."""
        if self._gpu is None:
            return None
        try:
            found = pynvml.nvmlDeviceGetMemoryInfo(self._gpu)
        except pynvml.NVMLError:
            return None
        return GpuMemory(used=int(found.used), total=int(found.total))


def _first_visible(visible: str) -> object:
    """Return the driver's handle: CUDA numbers GPUs among those that it is shown."""
    first = visible.partition(",")[0].strip()
    if not first or first.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(first or 0))
    return pynvml.nvmlDeviceGetHandleByUUID(first)
