"""The harness itself: a case that is met passes, and each kind of fault is seen."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.golden.case import Adapter, Built, Case, Tensors, find_cases
from tests.golden.compare import mismatches
from tests.golden.systems import SYSTEMS

CASES = Path(__file__).resolve().parent / "cases"


@pytest.fixture
def case() -> Case:
    return Case.load(CASES / "mamba_block" / "case.npz")


def changed(case: Case, key: str, array: np.ndarray) -> Case:
    return dataclasses.replace(case, arrays={**case.arrays, key: array})


@pytest.mark.parametrize("key", ["out:y", "grad:in:x", "grad:param:A_log", "param:D", "in:x", "cot:y"])
def test_a_changed_number_is_seen(case: Case, key: str) -> None:
    array = case.arrays[key].copy()
    array.flat[np.argmax(np.abs(array))] *= 1.001
    assert mismatches(changed(case, key, array), SYSTEMS["mamba_block"], torch.float64)


def test_other_shape_and_not_finite_are_seen(case: Case) -> None:
    adapter = SYSTEMS["mamba_block"]
    assert "shape" in mismatches(changed(case, "out:y", case.arrays["out:y"][:1]), adapter, torch.float32)[0]
    assert mismatches(changed(case, "out:y", np.full_like(case.arrays["out:y"], np.nan)), adapter, torch.float32)


def test_nan_is_met_by_nan_alone(case: Case) -> None:
    adapter = SYSTEMS["mamba_block"]
    lost = changed(case, "in:x", np.full_like(case.arrays["in:x"], np.nan))
    lines = mismatches(changed(lost, "out:y", np.full_like(case.arrays["out:y"], np.nan)), adapter, torch.float64)
    assert lines
    assert not [line for line in lines if line.startswith("out:")]
    assert [line for line in mismatches(lost, adapter, torch.float64) if line.startswith("out:")]


def test_a_missing_output_and_a_missing_parameter_are_seen(case: Case) -> None:
    more = changed(case, "out:state", case.arrays["out:y"])
    assert "out:state: missing" in mismatches(more, SYSTEMS["mamba_block"], torch.float64)[0]

    def forgetful(stem: str, hparams: dict[str, object], params: Tensors, inputs: Tensors) -> Built:
        return dataclasses.replace(SYSTEMS["mamba_block"](stem, hparams, params, inputs), parameters={})

    adapter: Adapter = forgetful
    assert "no such parameter" in mismatches(case, adapter, torch.float64)[0]


def test_a_wrong_gradient_norm_is_seen(case: Case) -> None:
    norm = np.linalg.norm(case.arrays["grad:param:D"])
    names, values = np.array(["D"]), np.array([norm], dtype=np.float32)
    right = changed(changed(case, "gradnorm_names", names), "gradnorm_values", values)
    assert not mismatches(right, SYSTEMS["mamba_block"], torch.float64)
    assert mismatches(changed(right, "gradnorm_values", values * 1.01), SYSTEMS["mamba_block"], torch.float64)


def test_a_wrong_gradient_of_one_output_is_seen() -> None:
    case = Case.load(CASES / "mambafcs" / "case_loss.npz")
    key = "grad:sek_first:pred_t1"
    assert not mismatches(case, SYSTEMS["mambafcs"], torch.float64)
    lines = mismatches(changed(case, key, case.arrays[key] * 1.001), SYSTEMS["mambafcs"], torch.float64)
    assert [line.partition(" ")[0] for line in lines] == [f"{key}:"]
    stray = changed(case, "grad:sek_first:pred_cd", case.arrays["grad:total:pred_cd"])  # SeK does not depend on it
    assert mismatches(stray, SYSTEMS["mambafcs"], torch.float64)


def test_mean_square_cases_are_strict_too() -> None:
    case = Case.load(CASES / "mambaout" / "case_block.npz")
    assert not mismatches(case, SYSTEMS["mambaout"], torch.float64)
    worse = changed(case, "out:y", case.arrays["out:y"] * 1.001)
    assert mismatches(worse, SYSTEMS["mambaout"], torch.float64)


def test_ill_conditioned_numbers_are_allowed_what_rounding_does_to_them_and_no_more() -> None:
    case = Case.load(CASES / "mhsvm" / "case_head.npz")
    assert not mismatches(case, SYSTEMS["mhsvm"], torch.float32)
    worse = changed(case, "out:y", case.arrays["out:y"] * 1.001)
    assert mismatches(worse, SYSTEMS["mhsvm"], torch.float32)


def test_a_case_found_twice_is_run_once(tmp_path: Path) -> None:
    copy = tmp_path / "mamba_block" / "case.npz"
    copy.parent.mkdir()
    copy.write_bytes((CASES / "mamba_block" / "case.npz").read_bytes())
    assert len(find_cases([CASES, tmp_path])) == len(find_cases([CASES]))
    copy.rename(copy.with_name("case_other.npz"))
    assert len(find_cases([CASES, tmp_path])) == len(find_cases([CASES])) + 1
