"""MONAI's baselines by name are the networks that papers report on."""

from pipelines.networks import NETWORKS


def test_swin_unetr_has_the_published_size() -> None:
    """BraTS 2021 configuration, as measured on MONAI's class."""
    network = NETWORKS["swinunetr"]({"in_channels": 4, "out_channels": 3, "feature_size": 48})
    assert sum(parameter.numel() for parameter in network.parameters()) == 62191941
