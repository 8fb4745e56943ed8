"""`--config`: the file's entries are the command's options, flags win, unknown names are told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from flows.cli import app
from tests.pipelines.cohort_maker import write_nifti


def test_options_come_from_the_file_and_flags_win(tmp_path: Path) -> None:
    labels = np.arange(27, dtype=np.uint8).reshape(3, 3, 3) % 3
    for folder in ("truth", "found"):
        write_nifti(tmp_path / folder / "a_dseg.nii.gz", labels, np.eye(4))
    config = tmp_path / "evaluate.toml"
    config.write_text(
        f'reference = "{tmp_path}/truth"\nprediction = "{tmp_path}/found"\n'
        f'output = "{tmp_path}/out"\nignore-label = 2\n'
    )
    done = CliRunner().invoke(app, ["evaluate", "--config", str(config)])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out/evaluation.json").exists()
    assert "\n2 " not in done.output
    done = CliRunner().invoke(app, ["evaluate", "--config", str(config), "--ignore-label", "1"])
    assert "\n2 " in done.output


def test_unknown_names_and_unreadable_files_are_told(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    for text, told in (("outputs = 3", "outputs"), ("output = [", "TOML")):
        config.write_text(text)
        done = CliRunner().invoke(app, ["batch", "--config", str(config)], env={"COLUMNS": "300"})
        assert done.exit_code == 2
        assert told in done.output
