"""Mask decoder after Segment Anything: class tokens and image features look at each other, then make masks.

Letters in this file: B batch, K classes (one token each), L positions of the feature map, C = 256 as published.
Definition followed: Kirillov et al., "Segment Anything" (2023), sections A.1 to A.3, without prompts and without the
quality token. There is no golden case for it; names are those of the published mask decoder.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medmamba.errors import ConfigError
from medmamba.layers.ss2d import ChannelNorm


class CrossAttention(nn.Module):
    """Queries (B, M, C) look at keys and values (B, L, C) through heads that together are `inner` wide."""

    def __init__(self, width: int, heads: int, *, narrow: int = 1) -> None:
        super().__init__()
        inner = width // narrow
        if inner % heads:
            raise ConfigError(f"{inner} channels do not fall into {heads} heads")
        self.heads = heads
        self.q_proj = nn.Linear(width, inner)
        self.k_proj = nn.Linear(width, inner)
        self.v_proj = nn.Linear(width, inner)
        self.out_proj = nn.Linear(inner, width)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        parts = (self.q_proj(queries), self.k_proj(keys), self.v_proj(values))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        out: Tensor = self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class TwoLayers(nn.Module):
    """lin1, ReLU, lin2."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(width, hidden)
        self.lin2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lin2(F.relu(self.lin1(x)))
        return out


class TwoWayBlock(nn.Module):
    """Tokens among themselves, tokens to image, perceptron, image to tokens; each residual and then normed."""

    def __init__(self, width: int, heads: int, hidden: int, *, first: bool) -> None:
        super().__init__()
        self.first = first  # the first block's tokens are their own positions: no residual around self-attention
        self.self_attn = CrossAttention(width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attn_token_to_image = CrossAttention(width, heads, narrow=2)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = TwoLayers(width, hidden)
        self.norm3 = nn.LayerNorm(width)
        self.norm4 = nn.LayerNorm(width)
        self.cross_attn_image_to_token = CrossAttention(width, heads, narrow=2)

    def forward(self, tokens: Tensor, image: Tensor, places: Tensor, image_places: Tensor) -> tuple[Tensor, Tensor]:
        placed = tokens if self.first else tokens + places
        among = self.self_attn(placed, placed, tokens)
        tokens = self.norm1(among if self.first else tokens + among)
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + places, image + image_places, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        seen = self.cross_attn_image_to_token(image + image_places, tokens + places, tokens)
        return tokens, self.norm4(image + seen)


class TwoWayTransformer(nn.Module):
    """Tokens (B, K, C) and features (B, L, C) at `image_places` (L, C) -> both, informed of each other."""

    def __init__(self, width: int, *, depth: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(width, heads, hidden, first=number == 0) for number in range(depth))
        self.final_attn_token_to_image = CrossAttention(width, heads, narrow=2)
        self.norm_final_attn = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, image: Tensor, image_places: Tensor) -> tuple[Tensor, Tensor]:
        places = tokens
        for block in self.layers:
            tokens, image = block(tokens, image, places, image_places)
        final = self.final_attn_token_to_image(tokens + places, image + image_places, image)
        return self.norm_final_attn(tokens + final), image


class Hypernetwork(nn.Module):
    """Three linear layers with ReLU between: a token -> the weights of its mask."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, out)])

    def forward(self, x: Tensor) -> Tensor:
        first, second, last = self.layers
        out: Tensor = last(F.relu(second(F.relu(first(x)))))
        return out


class FourierPlaces(nn.Module):
    """Sines and cosines of random projections of the positions in 0..1: any (rows, columns) -> (L, width)."""

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, width // 2))

    def forward(self, rows: int, columns: int) -> Tensor:
        matrix = self.positional_encoding_gaussian_matrix
        y, x = ((torch.arange(n, device=matrix.device, dtype=matrix.dtype) + 0.5) / n for n in (rows, columns))
        grid = torch.stack([x.expand(rows, -1), y[:, None].expand(-1, columns)], dim=-1)
        angles = 2 * math.pi * ((2 * grid - 1) @ matrix)
        return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(0, 1)


class MaskDecoder(nn.Module):
    """Features (B, width, rows, columns) -> scores (B, K, 4 rows, 4 columns)."""

    def __init__(self, width: int, classes: int, *, depth: int, heads: int, hidden: int) -> None:
        super().__init__()
        if width % 8:
            raise ConfigError(f"the mask decoder's width must be a multiple of 8, got {width}")
        self.places = FourierPlaces(width)
        self.transformer = TwoWayTransformer(width, depth=depth, heads=heads, hidden=hidden)
        self.mask_tokens = nn.Embedding(classes, width)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(width, width // 4, 2, 2),
            ChannelNorm(width // 4, eps=1e-6),
            nn.GELU(),
            nn.ConvTranspose2d(width // 4, width // 8, 2, 2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(Hypernetwork(width, width // 8) for _ in range(classes))

    def forward(self, features: Tensor) -> Tensor:
        places = self.places(*features.shape[2:])
        tokens = self.mask_tokens.weight.expand(len(features), -1, -1)
        tokens, image = self.transformer(tokens, features.flatten(2).mT, places)
        fine = self.output_upscaling(image.mT.reshape(features.shape))
        pairs = zip(self.output_hypernetworks_mlps, tokens.unbind(1))
        weights = torch.stack([hypernetwork(token) for hypernetwork, token in pairs], dim=1)
        return torch.einsum("bkc,bchw->bkhw", weights, fine)
