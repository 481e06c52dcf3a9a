"""GPTQ against the paper's formula, column by column in float64, and against rounding to nearest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from dequantize import dequantized
from numpy.typing import NDArray

from families import save_model
from orin_kit.errors import UserError
from orin_kit.models.checkpoint import Checkpoint
from orin_kit.models.formats.compressed_tensors import WeightScheme
from orin_kit.quantize.gptq import Gptq, Hessian, inverse_factor, solve
from orin_kit.quantize.int4 import quantize_groups
from orin_kit.quantize.rtn import rtn
from orin_kit.quantize.sections import sections
from orin_kit.quantize.sequential import Fold, quantize_sequentially

SCHEMES = [
    WeightScheme(4, 128, True), WeightScheme(4, 32, False), WeightScheme(4, 64, True), WeightScheme(8, 128, False),
]  # fmt: skip
FOLD = Fold("", ("up",))


def correlated(rows: int, features: int) -> torch.Tensor:
    """Inputs whose features share directions and differ in size, as hidden states do."""
    mixed = torch.randn(rows, features // 4) @ torch.randn(features // 4, features) / 8
    return (mixed + 0.3 * torch.randn(rows, features)) * torch.rand(features).mul(2).exp()


def hessian_of(x: torch.Tensor) -> Hessian:
    hessian = Hessian(len(x))
    for part in x.split(100):
        hessian.add(part[None])
    return hessian


def by_the_paper(
    weight: NDArray[np.float64], hessian: NDArray[np.float64], scheme: WeightScheme, order: NDArray[np.int64] | None
) -> NDArray[np.float64]:
    """Equations 2 and 3 of arXiv 2210.17323: one column at a time, the inverse of what is left computed anew each time.

    w_F -= (w_q - quant(w_q)) / [H_F^-1]_qq * (H_F^-1)_q
    """
    w, done = weight.copy(), np.zeros_like(weight)
    damped = hessian + 0.01 * hessian.diagonal().mean() * np.eye(len(hessian))
    size = scheme.group_size
    left = list(range(w.shape[1]) if order is None else order)
    chosen: dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}

    def choose(group: int) -> None:
        columns = w[:, group * size : (group + 1) * size].astype(np.float32)
        packed = quantize_groups(columns, size, bits=scheme.bits, symmetric=scheme.symmetric)
        zeros = packed.zero_points if packed.zero_points is not None else np.full((len(w), 1), 2 ** (scheme.bits - 1))
        chosen[group] = packed.scales[:, 0].astype(np.float64), zeros[:, 0].astype(np.float64)

    if order is not None:
        for group in range(w.shape[1] // size):
            choose(group)
    while left:
        q, group = left[0], left[0] // size
        if group not in chosen:
            choose(group)
        scale, zero = chosen[group]
        done[:, q] = (np.clip(np.rint(w[:, q] / scale) + zero, 0, 2**scheme.bits - 1) - zero) * scale
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        w[:, left] -= np.outer((w[:, q] - done[:, q]) / inverse[0, 0], inverse[0])
        left.pop(0)
    return done


def output_error(x: torch.Tensor, lost: NDArray[np.float64]) -> float:
    return float(np.square(x.numpy() @ lost.T).sum())


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_are_those_of_the_papers_formula(scheme: WeightScheme, act_order: bool) -> None:
    torch.manual_seed(0)
    x, weight = correlated(600, 256), torch.randn(48, 256)
    linear = torch.nn.ModuleDict({"up": torch.nn.Linear(256, 48, bias=False)})
    linear["up"].weight.data.copy_(weight)
    linear.requires_grad_(False)
    found = Gptq(act_order).quantize(linear, {FOLD: hessian_of(x)}, scheme, "layer.")["up"]

    hessian = (2 / len(x)) * (x.T.double() @ x.double()).numpy()
    order = np.argsort(-hessian.diagonal(), kind="stable") if act_order else None
    expected = by_the_paper(weight.double().numpy(), hessian, scheme, order)
    assert found.order is None and (found.zero_points is None) == scheme.symmetric
    # In fp32 a column may tip over to the next code, and those after it then differ as well.
    different = np.abs(found.dense() - expected) > 1e-5
    assert different.mean() < (0.02 if scheme.bits == 4 else 0.1), different.mean()
    theirs = output_error(x, expected - weight.double().numpy())
    mine = output_error(x, found.dense() - weight.double().numpy())
    assert mine == pytest.approx(theirs, rel=0.02)
    torch.testing.assert_close(linear["up"].weight, torch.from_numpy(found.dense()))
    how = dict(bits=scheme.bits, symmetric=scheme.symmetric)
    nearest = quantize_groups(weight.numpy(), scheme.group_size, **how).dense()
    assert mine < 0.6 * output_error(x, nearest - weight.double().numpy())


def test_factor_is_the_inverses(tmp_path: Path) -> None:
    hessian = hessian_of(correlated(400, 64)).matrix
    factor = inverse_factor(hessian).double()
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(64).double()
    assert (factor.tril(-1) == 0).all()
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(64).double(), rtol=0, atol=1e-3)


def test_independent_inputs_of_one_size_are_rounded_to_nearest() -> None:
    """A diagonal Hessian has nothing to make up for."""
    weight = torch.randn(32, 256)
    packed = solve(weight, inverse_factor(torch.eye(256)), WeightScheme(), None, "w")
    nearest = quantize_groups(weight.numpy(), 128)
    np.testing.assert_array_equal(packed.codes(), nearest.codes())
    np.testing.assert_array_equal(packed.scales, nearest.scales)


def test_columns_without_inputs_become_zero() -> None:
    x = correlated(200, 128)
    x[:, 5] = 0
    linear = torch.nn.ModuleDict({"up": torch.nn.Linear(128, 16, bias=False)}).requires_grad_(False)
    linear["up"].weight[:, 5] = 100  # would cost its group all precision
    packed = Gptq().quantize(linear, {FOLD: hessian_of(x)}, WeightScheme(), "")["up"]
    assert (packed.dense()[:, 5] == 0).all() and packed.scales.max() < 0.1


def test_more_features_than_inputs() -> None:
    """The Hessian is singular but for its damping."""
    x, weight = torch.randn(40, 256), torch.randn(8, 256)
    packed = solve(weight, inverse_factor(hessian_of(x).matrix), WeightScheme(), None, "w")
    nearest = quantize_groups(weight.numpy(), 128).dense()
    assert output_error(x, packed.dense() - weight.numpy()) < 0.5 * output_error(x, nearest - weight.numpy())


def test_weights_that_are_no_numbers_are_named() -> None:
    weight = torch.randn(8, 256)
    weight[3, 200] = float("nan")
    with pytest.raises(UserError, match=r"layers\.1\.up.*NaN"):
        solve(weight, inverse_factor(torch.eye(256)), WeightScheme(), None, "layers.1.up")


@pytest.mark.parametrize("name", ["qwen2", "conv"])
def test_gptq_beats_rounding_on_a_model(name: str, tmp_path: Path) -> None:
    model = save_model(tmp_path, name, num_hidden_layers=2)
    checkpoint = Checkpoint(tmp_path)
    cut = sections(checkpoint.spec, WeightScheme(), WeightScheme())
    rows = torch.randint(0, 256, (24, 64))  # few of the tokens: correlated inputs
    ids = torch.randint(0, 256, (8, 64))
    errors = []
    with torch.no_grad():
        expected = model(ids).logits
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        for parts in (rtn(checkpoint, cut), quantize_sequentially(checkpoint, cut, rows.numpy(), Gptq())):
            model.load_state_dict(dequantized(parts), strict=False)
            errors.append(float((model(ids).logits - expected).square().mean()))
    assert errors[1] < 0.85 * errors[0], errors
