"""The orders that published code visits, where the golden cases with their tables lie beside the checkout."""

import os
from pathlib import Path

import numpy as np
import pytest

from medmamba.nets.mhsvm import HEADS, route_pair
from medmamba.nets.plainmamba import continuous_orders
from medmamba.routes import inverse

SHARED = Path(os.environ.get("MEDMAMBA_SHARED", Path(__file__).resolve().parents[3] / "shared"))


def tables(system: str, prefix: str) -> dict[tuple[int, int], np.ndarray]:
    """Stored tables by grid shape; skips the test when the case is not there."""
    path = SHARED / "golden" / system / "case.npz"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    with np.load(path, allow_pickle=False) as file:
        found = {key: file[key] for key in file.files if key.startswith(f"ref:{prefix}_")}
    shapes = {key: key.rsplit("_", 1)[1].split("x") for key in found}
    return {(int(h), int(w)): found[key] for key, (h, w) in shapes.items()}


@pytest.mark.parametrize(("prefix", "part"), [("orders", 0), ("directions", 1)])
def test_plainmamba(prefix: str, part: int) -> None:
    for shape, table in tables("plainmamba", prefix).items():
        assert np.array_equal(continuous_orders(*shape)[part].numpy(), table)


def test_mhsvm() -> None:
    for shape, table in tables("mhsvm", "routes").items():
        orders = [order for pattern in HEADS for order in route_pair(pattern, *shape)]
        for order, (visited, step) in zip(orders, table, strict=True):
            assert np.array_equal(order.numpy(), visited)
            assert np.array_equal(inverse(order).numpy(), step)
