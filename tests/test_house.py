"""The walls: arrows point down, no circles, who may import what, nothing prints, importing is cheap."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ["medmamba", "geo", "pipelines", "flows"]
BELOW = {"medmamba": set(), "geo": {"medmamba"}, "pipelines": {"medmamba", "geo"}, "flows": {"medmamba", "pipelines"}}
ONLY_IN = {
    "prefect": ("flows/",),
    "prefect_dask": ("flows/",),
    "dask": ("flows/",),
    "typer": ("flows/",),
    "mlflow": ("pipelines/tracking.py", "pipelines/served_model.py"),
    "monai": ("pipelines/",),
    "pydantic": ("pipelines/",),
    "rasterio": ("geo/",),
    "pyproj": ("geo/",),
    "shapely": ("geo/",),
    "pystac": ("geo/",),
    "geopandas": ("geo/",),
    "pyogrio": ("geo/",),
    "nibabel": ("medmamba/formats/", "pipelines/demo/cohort.py"),
    "pydicom": ("medmamba/formats/",),
    "SimpleITK": ("medmamba/formats/",),
    "tifffile": ("medmamba/formats/",),
    "highdicom": ("medmamba/formats/",),
    "cc3d": ("pipelines/tasks/cleaning.py",),
    "fill_voids": ("pipelines/tasks/cleaning.py",),
    "triton": ("medmamba/ops/scan_triton.py", "medmamba/ops/scan_triton_kernels.py"),
}
GROUND = {"torch", "numpy", "einops", "safetensors", "medmamba"}
FILES = sorted(p for floor in FLOORS for p in (ROOT / floor).rglob("*.py"))


def imports(path: Path, *, top_only: bool = False) -> Iterator[str]:
    tree = ast.parse(path.read_text())
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{a.name}" for a in node.names)


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_keeps_to_its_room(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    room = name.split("/")[0]
    for module in imports(path):
        top = module.split(".")[0]
        if top in FLOORS and top != room:
            assert top in BELOW[room], f"{name} imports {module}: arrows point down only"
        if top in ONLY_IN:
            assert name.startswith(ONLY_IN[top]), f"{name} imports {module}: only {ONLY_IN[top]} may"
    if name.startswith(("medmamba/ops/", "medmamba/layers/", "medmamba/nets/", "medmamba/routes/")):
        allowed = GROUND | sys.stdlib_module_names | ({"triton"} if name.endswith("scan_triton_kernels.py") else set())
        foreign = {m.split(".")[0] for m in imports(path, top_only=True)} - allowed
        assert not foreign, f"{name} imports {foreign} at its top: networks run on a bare GPU machine"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_prints_or_unpickles(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            call = ast.unparse(node.func)
            assert call != "print", f"{path}:{node.lineno} prints"
            assert call not in ("pickle.load", "pickle.loads", "joblib.load"), f"{path}:{node.lineno} unpickles"
            if call == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            if call == "np.load":
                assert not any(k.arg == "allow_pickle" and ast.unparse(k.value) == "True" for k in node.keywords)


def test_no_circles_lazy_imports_counted() -> None:
    known = {module_of(p): p for p in FILES}
    edges = {m: {i for i in imports(p) if i in known and i != m} for m, p in known.items()}
    for package in [m for m, p in known.items() if p.name == "__init__.py"]:
        edges[package] = {e for e in edges[package] if not e.startswith(f"{package}.")}  # a table names its own room
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"circle: {' -> '.join([*trail[trail.index(module) :], module])}"
        if module not in done:
            for other in sorted(edges[module]):
                visit(other, (*trail, module))
            done.add(module)

    for module in sorted(known):
        visit(module, ())


def test_the_ground_floor_imports_little() -> None:
    code = (
        "import sys, medmamba, medmamba.ops.scan, medmamba.layers, medmamba.nets, medmamba.routes;"
        "bad = {'monai', 'mlflow', 'prefect', 'nibabel', 'rasterio', 'scipy', 'pandas', 'triton'} & set(sys.modules);"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "sys.argv = ['medmamba', '--help']\n"
        "from flows.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "bad = {'torch', 'numpy', 'monai', 'mlflow', 'prefect'} & set(sys.modules)\n"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "predict" in done.stdout
