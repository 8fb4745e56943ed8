"""What is shipped: the four rooms and nothing else; the command works outside the checkout."""

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def call(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for file in call("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines():
        if file.startswith(
            ("medmamba/", "geo/", "pipelines/", "flows/", "tests/golden/systems", "pyproject", "README")
        ):
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            (source / file).write_bytes((ROOT / file).read_bytes())
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    call(*pip, source, cwd=folder)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_four_rooms(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"medmamba", "geo", "pipelines", "flows"}
    assert "medmamba/ops/scan_kernel.cpp" in names
    assert any(n.endswith(".html") for n in names)


def test_the_command_answers_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """Dependencies come from the environment of the tests, without its editable install of this checkout."""
    call(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    call(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=tmp_path,
    )
    inside = call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    (Path(inside) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert "predict" in call(tmp_path / "venv" / "bin" / "medmamba", "--help", cwd=tmp_path)
    where = call(python, "-c", "import medmamba.errors, flows.cli; print(medmamba.__file__)", cwd=tmp_path)
    assert str(tmp_path) in where
