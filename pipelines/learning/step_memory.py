"""What one training step of a run takes in memory, told before it starts, and the memory mode that follows from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from medmamba.errors import ConfigError
from medmamba.memory import Cost, choose_memory, largest_patch, predict, without_data
from pipelines.learning.change_run import Run
from pipelines.learning.losses import dice_ce
from pipelines.networks import NETWORKS
from pipelines.serving.budget import machine_bytes, parse_bytes

OWN_SHARE = 0.5  # of the machine, when no budget is given: the system, the cohort and the next batch want the rest


def training_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """The loss of `train` on labels (B, *space)."""
    return dice_ce(scores, labels[:, None])


def available_bytes(run: Run, device: torch.device) -> int:
    """What a step may take: the run's own `ram`, or a share of the device's memory."""
    if run.ram is not None:
        return parse_bytes(run.ram)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory * OWN_SHARE)
    return int(machine_bytes() * OWN_SHARE)


def bare_network(run: Run) -> nn.Module:
    """The run's network without weights' data."""
    return without_data(lambda: NETWORKS[run.architecture](run.network_config))


def patch_shape(run: Run) -> tuple[int, ...]:
    """(B, C, *space) of one batch as the network sees it."""
    windowing = run.preprocessing.contract().windowing
    return (run.batch, len(run.preprocessing.channels), *windowing.network_size)


def step_cost(run: Run, memory: str | None = None) -> Cost:
    """The predicted cost of one step in float32 in a memory mode (None: the network's own)."""
    return predict(bare_network(run), patch_shape(run), memory=memory, loss=training_loss)


def largest_window(run: Run, budget: int, memory: str | None = None) -> tuple[tuple[int, ...], Cost]:
    """The largest patch the run's network could learn from within `budget` bytes, and its cost."""
    return largest_patch(bare_network(run), budget, batch=run.batch, memory=memory, loss=training_loss)


def settle_memory(network: nn.Module, run: Run, device: torch.device) -> None:
    """Sets the network's memory mode: the run's, or for "auto" the fastest that fits.

    Raises ConfigError for a mode on a network that has none, and when not even the most sparing fits a given `ram`.
    """
    modes: Any = getattr(network, "modes", None)
    if modes is None:
        if run.memory != "auto":
            raise ConfigError(
                f"memory={run.memory!r}: network {run.architecture!r} has no memory modes; remove the line"
            )
        return
    if run.memory != "auto":
        if run.memory not in modes:
            raise ConfigError(f"memory={run.memory!r}: this network has {', '.join(modes)}")
        network.memory = run.memory  # type: ignore[assignment]
        return
    budget = available_bytes(run, device)
    network.memory, cost = choose_memory(bare_network(run), patch_shape(run), budget, loss=training_loss)  # type: ignore[assignment]
    if run.ram is not None and cost.total > budget:
        raise ConfigError(
            f"a step on {patch_shape(run)} takes {cost.total >> 20} MiB even with memory={network.memory!r}, "
            f"{budget >> 20} MiB may be used; choose a smaller window or batch, or raise ram"
        )
