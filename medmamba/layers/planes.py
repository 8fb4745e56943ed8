"""A 2D network on volumes, plane by plane."""

from torch import Tensor, nn


class OnPlanes(nn.Module):
    """A network wearing a 2D `network`: (B, C, D, H, W) -> (B, K, D, H, W), every plane of the first axis by itself."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, volume: Tensor) -> Tensor:
        scores: Tensor = self.network(volume.transpose(1, 2).flatten(0, 1))
        return scores.unflatten(0, (volume.shape[0], volume.shape[2])).transpose(1, 2)
