# SPDX-License-Identifier: Apache-2.0
"""Whatever device W and H are on, solvers make their tensors there, answer there, and answer the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from featherweight.errors import OptionError
from featherweight.grids import GridSpec, fit_grid
from featherweight.solvers import (
    PRUNERS,
    QUANTIZERS,
    damp,
    eliminate_again,
    eliminate_with_traces,
    prune,
    prune_and_quantize,
    quantize,
    refit,
    refit_by_gradients,
    units_of,
)
from featherweight.solvers.adaround import adaround
from featherweight.solvers.problem import Quantization
from tests.solvers.elsewhere import Elsewhere, Pretending
from tests.solvers.problems import layer

PATTERNS: dict[str, tuple[Any, float | None]] = {
    "weight": ("weight", 0.5), "2:4": ("2:4", None), "1x4": ("1x4", 0.5), "2x3": ("2x3", 0.5), "column": ("column", 0.25),
    "sets": ([[0, 1], [2, 3, 4]], 0.1),
}  # fmt: skip
CASES = [
    (pattern, solver)
    for pattern in PATTERNS
    for solver in PRUNERS
    if pattern in ("weight", "2:4") or (pattern == "1x4" and PRUNERS[solver].tiles) or solver == "exact_obs"
]
# Learned rounding is below, with fewer steps; the other polishes are what admm's is.
CHOSEN = [name for name in QUANTIZERS if "adaround" not in name and name not in ("gptq+polish", "obq+polish")]


def same(solve: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    W, H, _ = layer(6, 12)
    with Pretending():
        found = solve(Elsewhere(W.clone()), Elsewhere(H.clone()))
    assert isinstance(found, Elsewhere)
    assert torch.allclose(found.inner, solve(W, H), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("pattern", "solver"), CASES)
def test_pruning(pattern: str, solver: str) -> None:
    form, sparsity = PATTERNS[pattern]
    same(lambda W, H: prune(W, H, form, sparsity, solver=solver).weights)


@pytest.mark.parametrize("spec", [GridSpec(3), GridSpec(3, chunk=5)], ids=str)
@pytest.mark.parametrize("solver", CHOSEN)
def test_quantization(solver: str, spec: GridSpec) -> None:
    same(lambda W, H: quantize(W.masked_fill(W > 0.4, 0.0), H, spec, solver=solver).weights)


def test_both_at_once() -> None:
    same(lambda W, H: prune_and_quantize(W, H, GridSpec(3), "2:4").weights)


def test_learned_rounding() -> None:
    def rounded(W: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
        held = W > 0.4
        return adaround(Quantization(W, damp(H), fit_grid(W, GridSpec(3)), held, True, 1 << 20), steps=20)

    same(rounded)


def test_parts_that_others_build_on() -> None:
    same(lambda W, H: refit(W, H, W > 0.1))
    same(lambda W, H: refit_by_gradients(lambda V: V @ H, W @ H, W, W > 0.1, diagonal=H.diagonal()))
    units = units_of("1x4", 6, 12)
    counts = torch.tensor([0, 1, 2, 3, 1, 2])
    same(lambda W, H: eliminate_again(W, damp(H).inverse, units, counts.to(W.device)))
    same(lambda W, H: eliminate_with_traces(W, damp(H).inverse, units)[0].losses)


def test_the_pretended_device_refuses_what_a_second_device_would() -> None:
    W, H, _ = layer(6, 24)
    with Pretending(), pytest.raises(RuntimeError, match="two devices"):
        Elsewhere(W) @ H
    with pytest.raises(OptionError, match="move one"):
        prune(W.to("meta"), H, "weight", 0.5)
