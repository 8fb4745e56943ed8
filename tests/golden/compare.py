"""Run a case through its adapter and list every number that differs: outputs, gradients, gradient norms."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from tests.golden.case import Adapter, Built, Case, Tensors, Tolerance

Numbers = dict[str, np.ndarray]

GRADIENT_FLOOR = 0.01  # of the largest gradient in the file: gradients that are zero by construction are only noise
STRICT = 1e-6  # of the largest entry, in float64 against numbers that were computed in float64
FEW_ROUNDINGS = 2.0**-22  # of an entry: four of float32's
NOISE = 3.0  # times what float32 does to our own result is allowed against numbers that were computed in float32


@dataclass(frozen=True, kw_only=True)
class Result:
    """What our code gives for a case: outputs under `out:`, gradients under `grad:` + `in:<name>` or parameter name.

    Gradients of one scalar output alone lie under `grad:<output>:<input>`, as in the case.
    """

    numbers: Numbers
    tolerance: Tolerance


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Allowed error: `relative` of each entry + `peak` of the largest + `NOISE` times the array's float32 noise."""

    relative: float
    peak: float
    noise: Numbers = field(default_factory=dict)

    def allowed(self, name: str, want: np.ndarray, floor: float = 0.0) -> np.ndarray:
        return (
            self.relative * np.abs(np.asarray(want, np.float64))
            + self.peak * max(peak(want), floor)
            + NOISE * peak(self.noise.get(name, np.zeros(1)))
        )


def mismatches(case: Case, adapter: Adapter, dtype: torch.dtype) -> list[str]:
    """Lines telling what is outside tolerance; empty when the case is met."""
    result = run(case, adapter, dtype)
    for_outputs, for_gradients = bounds(case, adapter, dtype, result)
    return compare_outputs(case, result, for_outputs) + compare_gradients(case, result, for_gradients)


def bounds(case: Case, adapter: Adapter, dtype: torch.dtype, result: Result) -> tuple[Bounds, Bounds]:
    """For outputs and for gradients.

    Cases with cotangents hold float64 numbers: strict in float64, what the SPEC measured in float32. Cases with the
    mean-square loss hold float32 numbers: CONVENTIONS.md rules, and a float64 run may differ by what float32 costs.
    """
    tolerance = result.tolerance
    if case.group("cot") or "out:loss_for_grad" not in case.arrays:
        if dtype == torch.float64:
            strict = Bounds(relative=0.0, peak=tolerance.ill_conditioned or STRICT)
            return strict, strict
        noise = rounding(case, adapter) if tolerance.noisy else {}
        outputs, gradients = tolerance.output, tolerance.gradient
        return Bounds(relative=0.0, peak=outputs, noise=noise), Bounds(relative=0.0, peak=gradients, noise=noise)
    noise = {}
    if dtype == torch.float64 or tolerance.noisy:
        other = run(case, adapter, torch.float32 if dtype == torch.float64 else torch.float64).numbers
        noise = {name: value - other[name] for name, value in result.numbers.items()}
    return Bounds(relative=1e-4, peak=1e-5, noise=noise), Bounds(relative=1e-3, peak=1e-4, noise=noise)


def rounding(case: Case, adapter: Adapter) -> Numbers:
    """What a few float32 roundings of every input and parameter do to the numbers, told in float64: their condition."""
    generator, nudged = np.random.default_rng(0), dict(case.arrays)
    for key, array in case.arrays.items():
        if key.startswith(("in:", "param:")) and np.issubdtype(array.dtype, np.floating):
            nudged[key] = array * (1 + FEW_ROUNDINGS * generator.standard_normal(array.shape))
    plain, moved = (run(one, adapter, torch.float64).numbers for one in (case, replace(case, arrays=nudged)))
    return {name: moved[name] - value for name, value in plain.items()}


def run(case: Case, adapter: Adapter, dtype: torch.dtype) -> Result:
    """Build, run forward and, where the case stores gradients, backward."""
    inputs = case.tensors("in", dtype)
    of_outputs = {key: key.split(":")[1:] for key in case.arrays if key.startswith("grad:")}
    of_outputs = {key: names for key, names in of_outputs.items() if names[0] not in ("in", "param")}
    wanted = set(case.group("grad:in")) | {name[3:] for name in case.gradnorms if name.startswith("in:")}
    wanted |= {name for _, name in of_outputs.values()}
    for name in wanted & set(inputs):
        inputs[name].requires_grad_()
    built = adapter(case.stem, case.hparams, case.tensors("param", dtype), inputs)
    outputs = built.forward(inputs)
    numbers = {f"out:{name}": value.detach().cpu().numpy() for name, value in outputs.items()}
    for key, (output, name) in of_outputs.items():
        numbers[key] = gradient_of(outputs[output], inputs[name])
    if case.group("grad:in") or case.group("grad:param") or case.gradnorms:
        loss = total_loss(case, built, outputs)
        numbers |= gradients(built, inputs, loss)
        numbers.setdefault("out:loss_for_grad", loss.detach().cpu().numpy())
    return Result(numbers=numbers, tolerance=built.tolerance)


def total_loss(case: Case, built: Built, outputs: Mapping[str, Tensor]) -> Tensor:
    """<out, cot> summed where cotangents are stored, else mean(out^2) summed over the stored outputs that enter it."""
    if built.loss is not None:
        return built.loss(outputs)
    cotangents = case.group("cot")
    if cotangents:
        pairs = ((outputs[name], torch.from_numpy(cot)) for name, cot in cotangents.items())
        return torch.stack([(out * cot.to(out.dtype)).sum() for out, cot in pairs]).sum()
    floating = (n for n, want in case.group("out").items() if np.issubdtype(want.dtype, np.floating))
    names = built.loss_outputs or tuple(n for n in floating if n != "loss_for_grad")
    return torch.stack([outputs[name].double().square().mean() for name in names]).sum()


def gradient_of(output: Tensor, value: Tensor) -> np.ndarray:
    """Of one scalar output; zero where it does not depend on the value."""
    if not output.requires_grad:
        return np.zeros(value.shape)
    (found,) = torch.autograd.grad(output, value, retain_graph=True, allow_unused=True)
    return np.zeros(value.shape) if found is None else found.cpu().numpy()


def gradients(built: Built, inputs: Tensors, loss: Tensor) -> Numbers:
    """Gradients under `grad:in:<name>` and `grad:<official parameter name>`; zero where the loss does not reach."""
    sources = {f"grad:in:{name}": value for name, value in inputs.items() if value.requires_grad}
    sources |= {f"grad:{name}": value for name, value in built.parameters.items() if value.requires_grad}
    found = torch.autograd.grad(loss, list(sources.values()), allow_unused=True)
    zero_if_none = (torch.zeros_like(s) if g is None else g for s, g in zip(sources.values(), found))
    return {name: gradient.cpu().numpy() for name, gradient in zip(sources, zero_if_none)}


def compare_outputs(case: Case, result: Result, bound: Bounds) -> list[str]:
    lines = []
    for name, want in sorted(case.group("out").items()):
        got = result.numbers.get(f"out:{name}")
        if got is None:
            lines.append(f"out:{name}: missing among {sorted(n for n in result.numbers if n.startswith('out:'))}")
        elif not np.issubdtype(want.dtype, np.floating):
            equal = got.shape == want.shape and np.array_equal(got, want)
            lines += [] if equal else [f"out:{name}: the whole numbers differ"]
        else:
            lines += far(f"out:{name}", got, want, bound.allowed(f"out:{name}", want))
    return lines


def compare_gradients(case: Case, result: Result, bound: Bounds) -> list[str]:
    stored = {f"grad:in:{name}": value for name, value in case.group("grad:in").items()}
    stored |= {f"grad:{name}": value for name, value in case.group("grad:param").items()}
    stored |= {key: case.arrays[key] for key in result.numbers if key.startswith("grad:") and key in case.arrays}
    highest = max((peak(value) for value in stored.values()), default=0.0)
    norms = {f"grad:{name}": np.float64(value) for name, value in case.gradnorms.items()}
    largest = max(map(float, norms.values()), default=0.0)
    lines = [f"{name}: no such parameter or input here" for name in {**stored, **norms} if name not in result.numbers]
    if lines:
        return lines
    for name, want in stored.items():
        lines += far(name, result.numbers[name], want, bound.allowed(name, want, GRADIENT_FLOOR * highest))
    for name, want in norms.items():
        spread = np.linalg.norm(bound.noise.get(name, np.zeros(1)).astype(np.float64).ravel())
        allowed = bound.allowed("", want, GRADIENT_FLOOR * largest) + NOISE * spread
        norm = np.linalg.norm(result.numbers[name].astype(np.float64).ravel())
        lines += far(name.replace("grad:", "gradnorm:", 1), np.asarray(norm), np.asarray(want), allowed)
    return lines


def peak(array: np.ndarray) -> float:
    return float(np.max(np.abs(np.asarray(array, np.float64)), initial=0.0))


def far(name: str, got: np.ndarray, want: np.ndarray, allowed: np.ndarray) -> list[str]:
    """One line when the shapes differ or any entry is further than `allowed` from what was wanted.

    A NaN is met by a NaN alone (published losses give some).
    """
    if got.shape != want.shape:
        return [f"{name}: shape {got.shape}, wanted {want.shape}"]
    error = np.abs(np.asarray(got, np.float64) - np.asarray(want, np.float64))
    if np.all((error <= allowed) | (np.isnan(got) & np.isnan(want))):
        return []
    return [f"{name}: error {np.max(error):.2e} of {peak(want):.2e}, allowed {np.max(allowed):.2e}"]
