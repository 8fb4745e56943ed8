"""A batch that dies anywhere goes on as if it had not: same products, only the unfinished cases run again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from flows.batch import ASIDE
from medmamba.files import TEMPORARY
from tests.ways.tiny import make_bundle, write_volume

CHECKOUT = Path(__file__).resolve().parents[2]
ONE_RUN = """
import sys
from pathlib import Path
from tests.ways.kill_driver import run
sys.exit(run(Path(sys.argv[1]), Path(sys.argv[2])))
"""


def products(output: Path) -> dict[str, Any]:
    """Every product by name: bytes, or a report without its times; page and traceback logs have times too."""
    found: dict[str, Any] = {}
    for path in output.rglob("*"):
        if ".medmamba" in path.parts or path.is_dir() or path.suffix in (".html", ".log"):
            continue
        found[str(path.relative_to(output))] = path.read_bytes()
        if path.suffix == ".json":
            found[str(path.relative_to(output))] = {k: v for k, v in json.loads(path.read_text()).items() if k != "run"}
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good cases and a bad one between them."""
    folder = tmp_path_factory.mktemp("kill")
    make_bundle(folder / "bundle")
    write_volume(folder / "in" / "a.nii.gz", 1)
    write_volume(folder / "in" / "b.nii", constant=True)
    write_volume(folder / "in" / "c.nii", 2)
    return folder


@pytest.fixture(scope="module")
def unbroken(root: Path) -> dict[str, Any]:
    command(root, root / "unbroken").wait()
    return products(root / "unbroken")


def command(root: Path, output: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", ONE_RUN, str(root), str(output)], cwd=CHECKOUT, env=environment)


def test_killed_at_every_durable_step(root: Path, unbroken: dict[str, Any]) -> None:
    assert {Path(n).name for n in unbroken} == {
        *("a_dseg.nii.gz", "a_dseg.png", "a_dseg.json", "c_dseg.nii.gz", "c_dseg.png", "c_dseg.json", "b.json"),
        *("dataset_description.json", "dseg.tsv"),
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "tests.ways.kill_driver", str(root)]
    told = json.loads(
        subprocess.run(arguments, cwd=CHECKOUT, env=environment, check=True, stdout=subprocess.PIPE).stdout
    )
    # Two steps (written, renamed) each: 3 attempts, 2 x (labels, picture, report), 1 record, 2 BIDS files, 1 page.
    assert len(told) == 2 * (3 + 2 * 3 + 1 + 2 + 1)
    for kill in told:
        place = f"killed at step {kill['n']}: {kill['step']}"
        output = root / f"out{kill['n']}"
        assert kill["code"] == ASIDE, place
        assert products(output) == unbroken, place
        assert not set(kill["finished"]) & set(kill["redone"]), place
        assert {"a", "c"} - set(kill["finished"]) <= set(kill["redone"]), place
        assert list(output.rglob(f"*{TEMPORARY}")) == [], place
        assert list((output / ".medmamba" / "attempts").rglob("*.json")) == [], place


@pytest.mark.slow
def test_killed_at_random(root: Path, unbroken: dict[str, Any]) -> None:
    draw = random.Random(0)
    for attempt in range(8):
        output = root / f"random{attempt}"
        process = command(root, output)
        time.sleep(draw.uniform(1.0, 6.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert command(root, output).wait() == ASIDE
        assert products(output) == unbroken
        assert list(output.rglob(f"*{TEMPORARY}")) == []
