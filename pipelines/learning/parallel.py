"""Several processes learning as one, started by `torchrun`: gradients averaged by DistributedDataParallel.

`torchrun --nproc-per-node 2 --no-python medmamba train RUN.toml`: `batch` of the run file is the share of one process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

LONGEST_WAIT = timedelta(days=1)  # the others wait while the first one validates


@dataclass(frozen=True, kw_only=True)
class Processes:
    """Which of how many processes this is; `first` writes what all share."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def part(self, device: torch.device) -> torch.device:
        """The device of this process: each has its own GPU of a machine."""
        return (
            torch.device("cuda", int(os.environ["LOCAL_RANK"])) if self.count > 1 and device.type == "cuda" else device
        )

    def learner(self, network: nn.Module) -> nn.Module:
        """The network whose gradients are the mean over all processes after backward."""
        return DistributedDataParallel(network) if self.count > 1 else network

    def wait(self) -> None:
        """Until all have come here."""
        if self.count > 1:
            dist.barrier()


def is_first() -> bool:
    """Whether this process may speak for all."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """Joins the group that torchrun describes in the environment; alone without one."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=LONGEST_WAIT)
    try:
        yield Processes(rank=dist.get_rank(), count=count)
    finally:
        dist.destroy_process_group()


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum over all processes; `values` itself when alone.

    Its gradient is that of this process's part, as often as there are processes: the mean that DistributedDataParallel
    takes is then the gradient of the whole sum.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total + dist.get_world_size() * (values - values.detach())
