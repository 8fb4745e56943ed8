"""Streaming against the whole image in one go: the same bits, whatever the slabs, and after a kill."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medmamba import scratch
from medmamba.errors import ConfigError
from medmamba.grid import Grid
from medmamba.layers.onednn import one_dnn
from medmamba.nets.mamba_unet import MambaUNet, MambaUNetConfig
from medmamba.nets.umamba import UMamba, UMambaConfig
from medmamba.sample import Image
from medmamba.scratch import Journal, ScratchMap
from medmamba.source import ArraySink, ArraySource
from medmamba.stream import StreamNotes, stream
from medmamba.stream_pass import Pass, Work
from medmamba.stream_plan import plan, scratch_numbers

SHAPE = (21, 10, 9)  # no side is a multiple of the strides: padded at the far ends


def make(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32, **settings: Any) -> MambaUNet:
    torch.manual_seed(0)
    small = {"in_channels": 2, "out_channels": 3, "widths": (8, 16), "depths": (1, 1), "state": 2}
    return MambaUNet(MambaUNetConfig(spatial_dims=len(shape), **{**small, **settings})).to(dtype).eval()


def noise(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)


def whole(network: nn.Module, array: np.ndarray) -> np.ndarray:
    """The image in one piece, as a window of its size is inferred."""
    x = torch.from_numpy(array).to(next(network.parameters()).dtype)[None]
    with torch.no_grad(), one_dnn(x):
        found: np.ndarray = network(x)[0].numpy()
    return found


def streamed(
    network: nn.Module, array: np.ndarray, folder: Path, rows: int, classes: int = 3, **more: Any
) -> tuple[np.ndarray, StreamNotes]:
    shape = array.shape[1:]
    source = ArraySource(Image(array, Grid(shape, np.eye(len(shape) + 1)), ("a", "b")[: len(array)]))
    sink = ArraySink(classes, shape, "float64")
    notes = stream(network, source, sink, scratch=folder / "maps", rows=rows, **more)
    assert not (folder / "maps").exists()
    return sink.array, notes


@pytest.mark.parametrize(
    ("mixer", "rows"), [("s6", 4), ("s6", 7), ("s6", 16), ("none", 7), ("ssd", 7), ("vssd", 4), ("vssd", 16)]
)
def test_the_whole_network_streams_bit_for_bit(mixer: str, rows: int, tmp_path: Path) -> None:
    network, array = make(mixer=mixer, widths=(8, 16, 32), depths=(1, 1, 1)), noise(SHAPE)
    found, _ = streamed(network, array, tmp_path, rows)
    assert np.array_equal(found, whole(network, array))


def test_tiles_of_their_own_differ(tmp_path: Path) -> None:
    """The same slabs without halo and state: what streaming must not be (issue 5: 1e-2)."""
    network, array = make(mixer="s6"), noise(SHAPE)
    tiles = np.concatenate([whole(network, array[:, r : r + 7]) for r in range(0, 21, 7)], axis=1)
    full = whole(network, array)
    assert np.abs(tiles - full).max() > 1e-2 * np.abs(full).max()


@pytest.mark.parametrize(
    "settings",
    [
        {"routes": ("snake", "plane_columns"), "mixer_from": 0},
        {"down": "split"},
        {"down": "strided"},
        {"branch": "inverted"},
        {"strides": ((1, 2, 2),)},
        {"coupling": "plain"},
    ],
    ids=str,
)
def test_every_way_of_the_config_streams(settings: dict[str, Any], tmp_path: Path) -> None:
    network, array = make(mixer="s6", **settings), noise(SHAPE)
    found, _ = streamed(network, array, tmp_path, 7)
    assert np.array_equal(found, whole(network, array))


@settings(max_examples=8)
@given(st.integers(1, 30), st.integers(1, 11), st.integers(3, 20), st.sampled_from(["s6", "vssd"]))
def test_any_raster_streams_in_float64(
    tmp_path_factory: pytest.TempPathFactory, height: int, width: int, rows: int, mixer: str
) -> None:
    network, array = make((height, width), torch.float64, mixer=mixer), noise((height, width))
    found, _ = streamed(network, array, tmp_path_factory.mktemp("stream"), rows)
    full = whole(network, array)
    assert np.abs(found - full).max() <= 1e-12 * np.abs(full).max()  # issue 5


def test_weights_far_from_their_start_stream_too(tmp_path: Path) -> None:
    """Trained weights: slow decays, steps of any size."""
    network, array = make(mixer="s6"), noise(SHAPE)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    found, _ = streamed(network, array, tmp_path, 4)
    assert np.array_equal(found, whole(network, array))


def test_a_chain_of_layers_streams_with_the_halo_of_all(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 4, 5, padding=2), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=2, dilation=2), nn.BatchNorm2d(3)
    ).eval()
    found, _ = streamed(network, noise((19, 8)), tmp_path, 3)
    np.testing.assert_allclose(found, whole(network, noise((19, 8))), atol=1e-6)
    assert plan(network, 2, (19, 8))[0].need.halo == 4


@pytest.mark.parametrize(
    ("network", "part"),
    [
        (lambda: make(mixer="gla"), r"body\.steps\.3\.branch\.mixer \(GLA\)"),
        (lambda: make((8, 8), mixer="s6", routes=("spiral",)), r"body\.steps\.3\.branch\.mixer \(S6\)"),
        (lambda: nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")), r"0 \(Conv2d\)"),
    ],
)
def test_a_part_that_cannot_stream_is_named(network: Any, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        plan(network(), 2, (8, 8, 8) if hasattr(network(), "body") and network().config.spatial_dims == 3 else (8, 8))


class Killed(BaseException):
    """What a kill looks like from inside."""


def test_a_kill_in_the_middle_is_gone_on_with_at_the_same_slab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, array = make(mixer="s6", mixer_from=0), noise(SHAPE)
    worked: Counter[str] = Counter()

    def counted(part: Pass) -> Work:
        def work(*arguments: Any) -> Any:
            worked[part.name] += 1
            return part.work(*arguments)

        return work

    make_plan = plan
    monkeypatch.setattr("medmamba.stream.plan", lambda *a: [replace(p, work=counted(p)) for p in make_plan(*a)])
    straight, notes = streamed(network, array, tmp_path, 7)
    slabs = {p.name: len(p.slabs(7)) for p in make_plan(network, 2, (22, 10, 10))}
    assert worked == slabs
    finished = 0

    def die(name: str, path: Path) -> None:
        nonlocal finished
        finished += name == "journal"
        if finished in (5, 20, 22):
            raise Killed

    worked.clear()
    monkeypatch.setattr(scratch, "step", die)
    for _ in range(3):
        with pytest.raises(Killed):
            streamed(network, array, tmp_path, 7, key="case")
        finished += 1  # the next process counts on
    resumed, again = streamed(network, array, tmp_path, 7, key="case")
    assert np.array_equal(resumed, straight)
    assert again.taken_over > 15
    assert sum(worked.values()) == sum(slabs.values())  # killed behind the journal's line: no slab was done twice
    assert again.slabs + again.taken_over == notes.slabs


def test_a_kill_before_the_journal_redoes_one_slab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, array = make(mixer="vssd", mixer_from=0), noise(SHAPE)
    straight, _ = streamed(network, array, tmp_path, 7)
    real, calls = Journal.add, []

    def torn(journal: Journal, name: str, slab: int) -> None:
        calls.append((name, slab))
        if len(calls) == 20:
            with journal.path.open("a") as file:
                file.write(json.dumps([name, slab])[:5])  # the line was being written
            raise Killed
        real(journal, name, slab)

    monkeypatch.setattr(Journal, "add", torn)
    with pytest.raises(Killed):
        streamed(network, array, tmp_path, 7, key="case")
    resumed, notes = streamed(network, array, tmp_path, 7, key="case")
    assert np.array_equal(resumed, straight)
    assert [c for c, n in Counter(calls).items() if n > 1] == [calls[19]]
    assert notes.taken_over == 19


def test_another_key_starts_anew(tmp_path: Path) -> None:
    Journal(tmp_path / "maps", "one").add("stem", 0)
    assert Journal(tmp_path / "maps", "one").finished == {("stem", 0)}
    ScratchMap(tmp_path / "maps" / "old.map", 2, (3,), np.dtype("float32")).write(0, np.ones((2, 3)))
    assert not Journal(tmp_path / "maps", "two").finished
    assert not (tmp_path / "maps" / "old.map").exists()


def test_maps_are_read_as_written(tmp_path: Path) -> None:
    values = np.arange(60, dtype=np.float64).reshape(5, 4, 3)
    scratch_map = ScratchMap(tmp_path / "a.map", 5, (4, 3), values.dtype)
    scratch_map.write(2, values[2:])
    scratch_map.write(0, values[:2])
    assert np.array_equal(scratch_map.read(1, 4), values[1:4])


def test_disk_needed_does_not_grow_with_depth() -> None:
    """Maps that nobody reads any more are freed: 3 x the couplings, the same scratch."""
    shallow, deep = (scratch_numbers(plan(make(depths=(d, d)), 2, (22, 10, 10))) for d in (1, 3))
    assert shallow == deep


def test_a_network_that_names_no_steps_is_refused() -> None:
    network = UMamba(UMambaConfig())
    with pytest.raises(ConfigError, match="cannot be streamed"):
        plan(network, 1, (32, 32, 32))
