"""Data-parallel processes, started by `torchrun`: gloo on a CPU, nccl on GPUs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class Worker:
    """This process among `world_size` that train one model, and the device it uses."""

    rank: int = 0
    world_size: int = 1
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Return whether this process writes the files and draws the progress bar."""
        return self.rank == 0

    def broadcast(self, value: float) -> float:
        """Return the first process' value in every process."""
        if self.world_size == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(shared, src=0)
        return float(shared.item())

    def sum(self, value: float) -> float:
        """Return the sum of a value over all processes."""
        if self.world_size == 1:
            return value
        total = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total.item())


@contextmanager
def join_workers(device: torch.device | None = None) -> Iterator[Worker]:
    """Join the process group that torchrun's environment describes; alone without torchrun."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device is None:
        gpu = torch.cuda.is_available()
        device = torch.device("cuda", local_rank) if gpu else torch.device("cpu")
    if world_size == 1:
        yield Worker(device=device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Worker(rank=dist.get_rank(), world_size=world_size, device=device)
    finally:
        dist.destroy_process_group()
