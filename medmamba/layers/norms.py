"""Normalisations that two networks or more share."""

import torch.nn.functional as F
from torch import Tensor, nn


class GatedRMSNorm(nn.RMSNorm):
    """Root-mean-square norm over the last axis with a SiLU gate, parameter `weight`.

    Gate first (Mamba-2): norm(x * silu(z)); norm first (Hydra): norm(x) * silu(z).
    """

    def __init__(self, width: int, *, norm_before_gate: bool, eps: float = 1e-5) -> None:
        super().__init__(width, eps=eps)
        self.norm_before_gate = norm_before_gate

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """x and gate (..., width) -> (..., width); without a gate the plain norm."""
        if gate is None:
            return super().forward(x)
        if self.norm_before_gate:
            return super().forward(x) * F.silu(gate)
        return super().forward(x * F.silu(gate))
