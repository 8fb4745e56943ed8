import json
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from torch import nn

from medmamba.bundle import Bundle, save_bundle
from medmamba.errors import BundleError
from medmamba.files import atomic_write, hash_json, write_json
from medmamba.preprocessing import Channel, Preprocessing
from medmamba.windows import Windowing

PREPROCESSING = Preprocessing(
    channels=(Channel(role="t1"),), windowing=Windowing(size=(4, 4, 4), overlap=(2, 2, 2)), spacing=(2.0, 2.0, 2.0)
)
BUILDERS = {"conv": lambda c: nn.Conv3d(1, c["out_channels"], 1), "wide": lambda c: nn.Conv3d(1, 9, 1)}


def fail_half_way(file: BinaryIO) -> None:
    file.write(b"new")
    raise OSError("half way")


def save(folder: Path, *, seed: int = 0, folds: int = 1, name: str = "tiny") -> Bundle:
    torch.manual_seed(seed)
    states = [nn.Conv3d(1, 2, 1).state_dict() for _ in range(folds)]
    return save_bundle(
        folder,
        name=name,
        network="conv",
        config={"out_channels": 2},
        preprocessing=PREPROCESSING,
        task={"name": "segmentation", "labels": {"1": "x"}},
        states=states,
        card={"origin": "test"},
    )


def test_what_changes_the_function_changes_the_id_and_the_card_does_not(tmp_path: Path) -> None:
    one, two = save(tmp_path / "a"), save(tmp_path / "b")
    assert one.id == two.id == Bundle.load(tmp_path / "a").id
    assert one.id != save(tmp_path / "c", seed=1).id
    values = json.loads((tmp_path / "a" / "bundle.json").read_text())
    write_json(tmp_path / "a" / "bundle.json", {**values, "card": {"origin": "elsewhere"}})
    assert Bundle.load(tmp_path / "a").id == one.id
    values["preprocessing"]["spacing"] = [1.0, 1.0, 1.0]
    write_json(tmp_path / "a" / "bundle.json", values)
    assert Bundle.load(tmp_path / "a").id != one.id


def test_folds_are_the_mean_of_their_probabilities(tmp_path: Path) -> None:
    bundle = save(tmp_path, folds=3)
    network = bundle.build(BUILDERS)
    x = torch.randn(1, 1, 4, 4, 4)
    mean = torch.stack([f(x).softmax(1) for f in network.folds]).mean(0)
    torch.testing.assert_close(network(x).softmax(1), mean)


def test_a_broken_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no bundle\.json"):
        Bundle.load(tmp_path)
    bundle = save(tmp_path)
    with pytest.raises(BundleError, match="do not fit"):
        Bundle.load(tmp_path).build({"conv": BUILDERS["wide"]})
    with pytest.raises(BundleError, match="known: other"):
        bundle.build({"other": BUILDERS["conv"]})
    (tmp_path / "weights_0.safetensors").unlink()
    with pytest.raises(BundleError, match="weights_0"):
        Bundle.load(tmp_path)
    (tmp_path / "bundle.json").write_text("{")
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.load(tmp_path)


def test_weight_files_cannot_leave_the_folder(tmp_path: Path) -> None:
    save(tmp_path / "a")
    values = json.loads((tmp_path / "a" / "bundle.json").read_text())
    write_json(tmp_path / "b" / "bundle.json", {**values, "weights": ["../a/weights_0.safetensors"]})
    with pytest.raises(BundleError, match="not there"):
        Bundle.load(tmp_path / "b")


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "x.bin"
    target.write_bytes(b"old")
    with pytest.raises(OSError, match="half way"), atomic_write(target) as file:
        fail_half_way(file)
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]
    with atomic_write(target) as file:
        file.write(b"new")
    assert target.read_bytes() == b"new"
    assert target.stat().st_mode & 0o777 == 0o640
    assert hash_json({"b": 1, "a": 2}) == hash_json({"a": 2, "b": 1})
