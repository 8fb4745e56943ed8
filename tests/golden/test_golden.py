"""Every golden case found, in float64 and float32: outputs, gradients and gradient norms of someone else's code.

Cases lie as `<system>/<stem>.npz` in the folders named by MEDMAMBA_GOLDEN (separated like PATH; default:
`shared/golden` beside the checkout) and always in `tests/golden/cases`. A system that is not in `SYSTEMS` is
skipped as not yet built.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.golden.case import Case, find_cases
from tests.golden.compare import mismatches
from tests.golden.systems import SYSTEMS

HERE = Path(__file__).resolve().parent
DEFAULT = HERE.parents[2] / "shared" / "golden"


def folders() -> list[Path]:
    named = os.environ.get("MEDMAMBA_GOLDEN")
    outside = [Path(part) for part in named.split(os.pathsep) if part] if named else [DEFAULT]
    absent = [str(folder) for folder in outside if named and not folder.is_dir()]
    if absent:
        raise pytest.UsageError(f"MEDMAMBA_GOLDEN names folders that do not exist: {', '.join(absent)}")
    return [HERE / "cases", *outside]


def parameters() -> list[object]:
    return [pytest.param(path, id=f"{path.parent.name}-{path.stem}") for path in find_cases(folders())]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("path", parameters())
def test_case(path: Path, dtype: torch.dtype, record_property: Callable[[str, object], None]) -> None:
    record_property("golden", f"{path.parent.name}/{path}")
    if path.parent.name not in SYSTEMS:
        pytest.skip(f"{path.parent.name}: not yet built")
    case = Case.load(path)
    lines = mismatches(case, SYSTEMS[case.system], dtype)
    assert not lines, "\n".join([f"{path.parent.name}/{path.stem}: {len(lines)} differ", *lines[:20]])


def test_committed_cases_are_built_and_small() -> None:
    committed = sorted((HERE / "cases").glob("*/*.npz"))
    assert {path.parent.name for path in committed} <= set(SYSTEMS)
    assert all(path.stat().st_size <= 100_000 for path in committed)
