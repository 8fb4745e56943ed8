"""One of two processes that train a reversible body under DDP; writes its gradients: `ddp_driver.py RANK FOLDER`."""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from medmamba.nets.mamba_unet import MambaUNet

CONFIG = {"spatial_dims": 2, "widths": (4, 8), "depths": (1, 1), "state": 2, "out_channels": 2}


def network() -> MambaUNet:
    torch.manual_seed(0)
    return MambaUNet(MambaUNet.Config(**CONFIG), memory="full")  # type: ignore[arg-type]


def images() -> torch.Tensor:
    return torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def main(rank: int, folder: Path) -> None:
    meeting, patience = f"file://{folder / 'meeting'}", timedelta(seconds=100)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=patience)
    wrapped = torch.nn.parallel.DistributedDataParallel(network())
    for _ in range(2):  # the second step finds the hooks of the first
        wrapped.zero_grad()
        wrapped(images()[rank : rank + 1]).square().mean().backward()
    grads = {k: p.grad for k, p in wrapped.module.named_parameters() if p.grad is not None}
    save_file({k: g.contiguous() for k, g in grads.items()}, folder / f"{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
