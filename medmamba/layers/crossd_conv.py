"""Cross-D convolution: a 3D kernel that works on images through a slice the image itself chooses.

Letters in this file: B batch, I input and O output channels, G groups, K kernel size, H, W the image.
Definition followed: Yavuz, Yang, "Cross-D Conv: Cross-Dimensional Transferable Knowledge Base via Fourier Shifting
Operation" (arXiv 2411.02441). As published, the phase is that of a shift by one voxel along the turned axes, and the
turn is of first order. Truth for tests: golden case crossdconv.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.errors import ConfigError, ShapeError

HIDDEN = 16  # width of the little network that reads axis and angle from the image
TINY = 1e-8


class CrossDConv(nn.Module):
    """(B, I, H, W) -> (B, O, H', W'); `to_3d` gives the ordinary 3D convolution of the same kernel. No bias."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, padding: int = 0, groups: int = 1
    ) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ConfigError(f"the middle slice of the kernel is used: its size must be odd, got {kernel}")
        if in_channels % groups or out_channels % groups:
            raise ConfigError(f"{in_channels} and {out_channels} channels do not fall into {groups} groups")
        self.stride, self.padding, self.groups = stride, padding, groups
        self.weights_3d = nn.Parameter(torch.empty(out_channels, in_channels // groups, kernel, kernel, kernel))
        nn.init.kaiming_uniform_(self.weights_3d, a=math.sqrt(5))
        self.rotation_params = nn.Sequential(
            nn.Conv2d(in_channels, HIDDEN, 1), nn.BatchNorm2d(HIDDEN), nn.ReLU(), nn.Conv2d(HIDDEN, 4, 1)
        )

    def rotation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Unit axis (B, 3) and angle (B, 1) in radians, within 45 degrees, that the image (B, I, H, W) asks for."""
        maps = self.rotation_params(x).flatten(2)
        vector = (maps * maps.softmax(dim=-1)).sum(dim=-1)
        axis = vector[:, :3] / (vector[:, :3].norm(dim=1, keepdim=True) + TINY)
        return axis, math.pi / 4 * torch.tanh(vector[:, 3:])

    def rotated_weights(self, axis: Tensor, angle: Tensor) -> Tensor:
        """The kernel of every sample, (B, O, I / G, K, K, K)."""
        size = self.weights_3d.shape[-1]
        steps = torch.fft.fftfreq(size, device=axis.device, dtype=axis.dtype)
        frequencies = torch.stack(torch.meshgrid(steps, steps, steps, indexing="ij"))
        turned = torch.einsum("bij,jxyz->bixyz", first_order_turn(axis, angle), frequencies)
        angles = -2 * math.pi * turned.sum(dim=1)
        phase = torch.complex(torch.cos(angles), torch.sin(angles))[:, None, None]
        spectrum = torch.fft.fftn(self.weights_3d, dim=(-3, -2, -1))
        return torch.fft.ifftn(spectrum * phase, dim=(-3, -2, -1)).real

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise ShapeError(f"Cross-D convolution wants images (B, C, H, W), got {tuple(x.shape)}; volumes: to_3d()")
        weights = self.rotated_weights(*self.rotation(x))
        slices = weights[:, :, :, weights.shape[-1] // 2]
        side_by_side = x.flatten(0, 1)[None]
        groups = len(x) * self.groups
        y = F.conv2d(side_by_side, slices.flatten(0, 1), stride=self.stride, padding=self.padding, groups=groups)
        return y[0].unflatten(0, (len(x), -1))

    def to_3d(self) -> nn.Conv3d:
        """The 3D convolution that holds a copy of this kernel, for volumes."""
        out_channels, fan, size = self.weights_3d.shape[:3]
        conv = nn.Conv3d(
            fan * self.groups, out_channels, size, self.stride, self.padding, groups=self.groups, bias=False
        )
        conv.to(self.weights_3d).load_state_dict({"weight": self.weights_3d.detach()})
        return conv


def first_order_turn(axis: Tensor, angle: Tensor) -> Tensor:
    """I + angle * [axis]_x of shape (B, 3, 3): a rotation for small angles only, as published."""
    x, y, z = axis.unbind(dim=1)
    none = torch.zeros_like(x)
    cross = torch.stack([none, -z, y, z, none, -x, -y, x, none], dim=1).unflatten(1, (3, 3))
    return torch.eye(3, dtype=axis.dtype, device=axis.device) + angle[..., None] * cross
