"""Our networks have as many parameters as the published ones (numbers measured on the official code)."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from medmamba.layers.hydra import Hydra, hydra_config
from medmamba.layers.mamba import Mamba, MambaConfig
from medmamba.layers.mamba2 import Mamba2, Mamba2Config
from medmamba.layers.s4d import S4D, S4DConfig
from medmamba.nets.mambaout import MambaOut, MambaOutConfig
from medmamba.nets.segmamba import SegMamba, SegMambaConfig
from medmamba.nets.vim import Vim, VimConfig

SIZES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "mamba block": (lambda: Mamba(MambaConfig(d_model=768)), 3770880),
    "mamba-2 block": (lambda: Mamba2(Mamba2Config(d_model=768)), 3656356),
    "hydra block": (lambda: Hydra(hydra_config(768)), 3825224),
    "s4d layer": (lambda: S4D(S4DConfig(d_model=256)), 164864),
    "vim tiny": (lambda: Vim(VimConfig()), 7148008),
    "vim small": (lambda: Vim(VimConfig(width=384)), 25796584),
    "vim base": (lambda: Vim(VimConfig(width=768)), 97598440),
    "mambaout femto": (lambda: MambaOut(MambaOutConfig(depths=(3, 3, 9, 3), widths=(48, 96, 192, 288))), 7304536),
    "mambaout kobe": (lambda: MambaOut(MambaOutConfig(depths=(3, 3, 15, 3), widths=(48, 96, 192, 288))), 9141208),
    "mambaout tiny": (lambda: MambaOut(MambaOutConfig()), 26545096),
    "mambaout small": (lambda: MambaOut(MambaOutConfig(depths=(3, 4, 27, 3))), 48488072),
    "mambaout base": (lambda: MambaOut(MambaOutConfig(depths=(3, 4, 27, 3), widths=(128, 256, 512, 768))), 84813092),
    "segmamba": (lambda: SegMamba(SegMambaConfig(in_channels=4, out_channels=4)), 67416196),
}


@pytest.mark.parametrize("name", SIZES)
def test_number_of_parameters(name: str) -> None:
    make, size = SIZES[name]
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in make().parameters()) == size
