"""Published weights become a bundle with their contract, or are refused with every reason."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from flows.cli import app
from medmamba.bundle import Bundle
from medmamba.errors import BundleError, ConfigError
from pipelines.config import Contract
from pipelines.learning.weights import import_weights
from pipelines.networks import NETWORKS

CONTRACT = """
name = "liver"
labels = { 1 = "liver" }
[network]
widths = [4, 6]
kernels = [[3, 3, 3], [3, 3, 3]]
strides = [[1, 1, 1], [2, 2, 2]]
blocks = [1, 1]
decoder_blocks = [1]
[preprocessing]
window = [8, 8, 8]
channels = [{ role = "ct", clip = [-200, 300], scaling = "fixed", scale = 100 }]
"""


@pytest.fixture
def contract(tmp_path: Path) -> Contract:
    (tmp_path / "contract.toml").write_text(CONTRACT)
    return Contract.load(tmp_path / "contract.toml", architecture="umamba")


@pytest.fixture
def published(contract: Contract) -> dict[str, Tensor]:
    """The tensors as the official code saves them: with the encoder repeated under the decoder."""
    torch.manual_seed(0)
    own = {k: torch.randn_like(v) for k, v in NETWORKS["umamba"](contract.network_config).state_dict().items()}
    return own | {f"decoder.{k}": v.clone() for k, v in own.items() if k.startswith("encoder.")}


def loaded(bundle: Bundle) -> dict[str, Tensor]:
    return bundle.build(NETWORKS).state_dict()


def test_a_checkpoint_of_a_parallel_training_becomes_a_bundle(
    contract: Contract, published: dict[str, Tensor], tmp_path: Path
) -> None:
    file = tmp_path / "checkpoint_final.pth"
    wrapped = OrderedDict((f"module.{k}", v) for k, v in published.items())
    torch.save({"epoch": 3, "network_weights": wrapped}, file)
    bundle = import_weights(contract, file, tmp_path / "bundle")
    assert (bundle.name, bundle.network, bundle.classes) == ("liver", "umamba", 2)
    assert bundle.config["image_px"] == [8, 8, 8]  # a network made for one size gets the window
    assert bundle.preprocessing == contract.preprocessing.contract()
    assert bundle.card["imported"]["file"] == "checkpoint_final.pth"
    for name, value in loaded(bundle).items():
        assert torch.equal(value, published[name])


def test_the_command_reads_safetensors(published: dict[str, Tensor], contract: Contract, tmp_path: Path) -> None:
    save_file(published, tmp_path / "umamba.safetensors")
    options = ["--contract", str(tmp_path / "contract.toml"), "--output", str(tmp_path / "bundle")]
    done = CliRunner().invoke(app, ["import-weights", "umamba", str(tmp_path / "umamba.safetensors"), *options])
    assert done.exit_code == 0, done.output
    assert str(tmp_path / "bundle") in done.output
    with pytest.raises(ConfigError, match="not empty"):
        import_weights(contract, tmp_path / "umamba.safetensors", tmp_path / "bundle")


def test_no_contract_no_bundle(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["import-weights", "umamba", "w.pth", "--output", str(tmp_path / "bundle")])
    assert done.exit_code == 2
    assert "--contract" in done.output


def test_every_tensor_that_does_not_fit_is_named(
    contract: Contract, published: dict[str, Tensor], tmp_path: Path
) -> None:
    head = next(name for name in published if name.endswith("seg_layers.0.bias"))
    weight = head.replace("bias", "weight")
    published[weight], published["head.extra"] = torch.zeros(5, 4, 1, 1, 1), published.pop(head)
    torch.save(published, tmp_path / "w.pth")
    with pytest.raises(BundleError) as told:
        import_weights(contract, tmp_path / "w.pth", tmp_path / "bundle")
    for part in (
        "w.pth",
        f"1 missing: {head}",
        "1 left over: head.extra",
        f"{weight} (5, 4, 1, 1, 1) instead of (2, 4",
    ):
        assert part in str(told.value)
    assert not (tmp_path / "bundle").exists()


class Trap:
    """Would make a folder when unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> object:
        return Path.mkdir, (self.folder,)


def test_a_file_with_code_in_it_is_not_run(contract: Contract, tmp_path: Path) -> None:
    torch.save({"state_dict": Trap(tmp_path / "harm")}, tmp_path / "w.pth")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Trap(tmp_path / "harm")))
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "w.safetensors").write_bytes(b"\0" * 40)
    for name in ("w.pth", "plain.pkl", "text.pth", "w.safetensors", "absent.pth"):
        with pytest.raises(BundleError, match=name):
            import_weights(contract, tmp_path / name, tmp_path / "bundle")
    assert not (tmp_path / "harm").exists()


def test_contracts_that_cannot_be(tmp_path: Path, contract: Contract) -> None:
    values = contract.model_dump(mode="json")
    with pytest.raises(ConfigError, match="1 faults"):
        Contract.check({**values, "epochs": 3})
    for architecture, what in (("vmamba", "whole images"), ("daf", "takes 2 axes")):
        with pytest.raises(ConfigError, match=what):
            _ = Contract.check({**values, "architecture": architecture}).network_config


def test_keras_tensors_are_turned(tmp_path: Path) -> None:
    values = {
        "name": "glioma", "architecture": "agunet", "labels": {"1": "tumour"}, "network": {"widths": [4, 6, 8]},
        "preprocessing": {"window": [8, 8, 8], "channels": [{"role": "t1"}]},
    }  # fmt: skip
    contract = Contract.check(values)
    from medmamba.nets.agunet import KERAS_PARTS, keras_names

    network = NETWORKS["agunet"](contract.network_config)
    state, names = network.state_dict(), keras_names(network)
    parts = {ours: keras for keras, ours in KERAS_PARTS.items() if keras not in ("gamma", "beta")}
    published = {}
    for layer, ours in names.items():
        for key, value in state.items():
            module, _, part = key.rpartition(".")
            if module == ours and part != "num_batches_tracked":
                norm = value.dim() == 1 and layer.startswith("batch")
                keras = {"weight": "gamma", "bias": "beta"}.get(part, parts.get(part)) if norm else parts[part]
                filled = torch.randn_like(value)
                state[key] = filled
                published[f"{layer}/{keras}"] = filled.permute(2, 3, 4, 1, 0) if filled.dim() == 5 else filled
    save_file({k: v.contiguous() for k, v in published.items()}, tmp_path / "k.safetensors")
    got = loaded(import_weights(contract, tmp_path / "k.safetensors", tmp_path / "bundle"))
    assert all(torch.equal(value, state[name]) for name, value in got.items())
