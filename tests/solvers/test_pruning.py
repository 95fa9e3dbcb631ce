# SPDX-License-Identifier: Apache-2.0
"""`prune` keeps the pattern, reports the true loss, and refuses what cannot be done, whatever the solver."""

import math

import pytest
import torch

from featherweight.errors import OptionError
from featherweight.patterns import Pattern
from featherweight.solvers import PRUNERS, layer_loss, prune
from tests.solvers.problems import layer, output_error

SINGLE = list(PRUNERS)
TILED = [name for name in PRUNERS if PRUNERS[name].tiles]


@pytest.mark.parametrize("solver", [*SINGLE, "best"])
def test_single_weights_reach_the_sparsity_and_the_loss_is_true(solver: str) -> None:
    W, H, X = layer(6, 20)
    result = prune(W, H, "weight", 0.65, solver=solver)
    assert int(result.pruned.sum()) == 78
    assert bool((result.weights[result.pruned] == 0).all())
    assert result.loss == pytest.approx(output_error(W, result.weights, X), rel=1e-9)
    assert result.losses[result.solver] == result.loss


@pytest.mark.parametrize("solver", [*SINGLE, "best"])
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 4), (4, 8)])
def test_n_of_every_m_input_channels_are_kept(solver: str, n: int, m: int) -> None:
    W, H, _ = layer(5, 32)
    result = prune(W, H, Pattern("n:m", n=n, m=m), solver=solver, run=16)
    assert bool(((~result.pruned).view(5, -1, m).sum(2) == n).all())
    assert bool((result.weights[result.pruned] == 0).all())


@pytest.mark.parametrize("solver", [*TILED, "best"])
@pytest.mark.parametrize(("r", "c"), [(1, 4), (4, 1), (2, 3)])
def test_tiles_go_whole(solver: str, r: int, c: int) -> None:
    W, H, _ = layer(8, 24)
    result = prune(W, H, f"{r}x{c}", 0.5, solver=solver)
    share = result.pruned.view(8 // r, r, 24 // c, c).double().mean((1, 3))
    assert bool(((share == 0) | (share == 1)).all())
    assert 96 <= int(result.pruned.sum()) < 96 + r * c


@pytest.mark.parametrize("solver", [*TILED, "best"])
def test_columns_go_whole_over_all_taps(solver: str) -> None:
    W, H, _ = layer(4, 12)
    result = prune(W, H, "column", 0.5, run=4, solver=solver)
    assert bool((result.pruned == result.pruned[:1]).all())
    assert result.pruned[0].view(3, 4).sum(0).sort().values.tolist() == [0, 0, 3, 3]


def test_column_sets_go_together_and_others_stay() -> None:
    W, H, _ = layer(4, 10)
    result = prune(W, H, [[0, 9], [1, 8], [2, 7, 3]], 0.3, solver="exact_obs")
    gone = set(result.pruned[0].nonzero()[:, 0].tolist())
    assert len(gone) >= 3
    assert gone <= {0, 9, 1, 8, 2, 7, 3}
    assert all(len(gone & columns) in (0, len(columns)) for columns in ({0, 9}, {1, 8}, {2, 7, 3}))


def test_short_groups_and_tiles_at_the_end_of_a_run_follow_the_stated_rule() -> None:
    W, H, _ = layer(3, 14)
    groups = prune(W, H, "2:4", run=7)  # 4 + 3 channels at each of two taps: 2 and 1 go
    assert (groups.pruned.view(3, 2, 7)[:, :, :4].sum(2) == 2).all() and (
        groups.pruned.view(3, 2, 7)[:, :, 4:].sum(2) == 1
    ).all()
    tiles = prune(W, H, "1x4", 0.5, run=7)
    for tile in (slice(0, 4), slice(4, 7), slice(7, 11), slice(11, 14)):
        assert bool((tiles.pruned[:, tile].sum(1) % tiles.pruned[:, tile].shape[1] == 0).all())


@pytest.mark.parametrize("solver", ["admm+swap", "exact_obs", "sparsegpt"])
def test_float32_goes_in_and_comes_out(solver: str) -> None:
    W, H, _ = layer(4, 12)
    result = prune(W.float(), H.float(), "weight", 0.5, solver=solver)
    assert result.weights.dtype == torch.float32
    assert result.loss == pytest.approx(prune(W, H, "weight", 0.5, solver=solver).loss, rel=1e-3)


def test_dead_inputs_are_removed_first() -> None:
    W, H, _ = layer(4, 12)
    H[[2, 5]] = 0.0
    H[:, [2, 5]] = 0.0
    W[:, [2, 5]] = 10.0
    for solver in PRUNERS:
        result = prune(W, H, "weight", 8 / 48, solver=solver)
        if solver != "sparsegpt" and solver != "sparsegpt+refit":  # which spreads zeros evenly over blocks of columns
            assert result.pruned.nonzero().tolist() == [[row, column] for row in range(4) for column in (2, 5)], solver
        assert result.loss == pytest.approx(0.0, abs=1e-12)
    few = prune(W, H, "weight", 3 / 48, solver="admm")
    assert few.weights[:, [2, 5]].flatten().sort().values.tolist() == [0.0] * 3 + [10.0] * 5
    assert "2 of 12 inputs" in result.notes[0]


def test_best_is_the_least_of_what_its_budget_paid_for() -> None:
    W, H, _ = layer(64, 48)
    rich, poor = prune(W, H, "weight", 0.9), prune(W, H, "weight", 0.9, work=0.0)
    assert set(rich.losses) == {"magnitude", "wanda", "sparsegpt", "admm+swap"}
    assert set(poor.losses) == {"magnitude", "wanda", "sparsegpt", "magnitude+refit"}
    assert set(prune(W, H, "1x4", 0.5).losses) == {"magnitude", "wanda", "admm"}
    for result in (rich, poor):
        assert result.loss == min(result.losses.values())
    again = prune(W, H, "weight", 0.9)
    assert torch.equal(again.weights, rich.weights) and again.work == rich.work


def test_a_budget_too_small_for_the_search_is_said() -> None:
    W, H, _ = layer(8, 24)
    assert not prune(W, H, "weight", 0.5).notes
    assert "magnitude+refit only" in prune(W, H, "weight", 0.5, work=0.0).notes[0]


@pytest.mark.parametrize("solver", ["magnitude", "wanda", "admm", "best"])
@pytest.mark.parametrize("judged", [False, True])
def test_dead_inputs_change_nothing_for_the_live_ones(solver: str, judged: bool) -> None:
    """The live columns are solved as if there were no others, with the zeros that are left for them."""
    W, H, _ = layer(6, 20)
    live = torch.tensor([i for i in range(20) if i % 4 != 1])
    wide, broad = torch.full((6, 20), 3.0, dtype=torch.float64), torch.zeros(20, 20, dtype=torch.float64)
    wide[:, live], broad[live[:, None], live] = W[:, :15], H[:15, :15]
    seen = []

    def judge(V: torch.Tensor) -> float:
        seen.append(V)
        return layer_loss(W[:, :15], V if V.shape[1] == 15 else V[:, live], 1.5 * H[:15, :15])

    options = {"solver": solver, "judge": judge if judged else None}
    alone = prune(W[:, :15], H[:15, :15], "weight", 42 / 90, **options)
    found = prune(wide, broad, "weight", (42 + 30) / 120, **options)
    assert int(found.pruned.sum()) == 72
    assert torch.equal(found.pruned, found.weights == 0)
    torch.testing.assert_close(found.weights[:, live], alone.weights)
    assert (found.solver, found.losses, found.judged) == (
        alone.solver,
        pytest.approx(alone.losses),
        pytest.approx(alone.judged),
    )
    assert all(V.shape == (6, 20) for V in seen[len(seen) // 2 :])


@pytest.mark.parametrize(("pattern", "sparsity"), [("weight", 0.5), ("weight", 0.8), ("2:4", None), ("1x4", 0.5)])
@pytest.mark.parametrize("rows", [4, 64])
def test_best_is_better_than_exact_obs_and_counts_no_more_work(pattern: str, sparsity: float | None, rows: int) -> None:
    ours = exact = 0.0
    for seed in range(3):
        W, H, _ = layer(rows, 64, seed=seed)
        best, obs = (prune(W, H, pattern, sparsity, solver=solver) for solver in ("best", "exact_obs"))
        ours, exact = ours + math.log(best.loss), exact + math.log(obs.loss)
        # With so few rows the factorizations of the search cost more than the elimination; that is allowed.
        assert best.work <= 1.2 * max(obs.work, prune(W, H, pattern, sparsity, solver="admm").work)
    assert ours < exact


@pytest.mark.parametrize("solver", ["admm+swap", "exact_obs", "magnitude+refit"])
@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_none_and_all(solver: str, sparsity: float) -> None:
    W, H, _ = layer(3, 8)
    result = prune(W, H, "weight", sparsity, solver=solver)
    assert torch.equal(result.weights, W * (1 - sparsity))


def test_zeros_that_are_there_are_kept() -> None:
    W, H, _ = layer(5, 16)
    W[torch.rand(5, 16, generator=torch.Generator().manual_seed(0)) < 0.3] = 0.0
    for solver in ("exact_obs", "admm"):
        result = prune(W, H, "weight", 0.6, solver=solver)
        assert bool(result.pruned[W == 0].all()), solver


@pytest.mark.parametrize(
    ("pattern", "sparsity", "options", "message"),
    [
        ("weight", None, {}, "share of zeros"),
        ("weight", 1.5, {}, "share of zeros"),
        ("2:4", 0.5, {}, "leave sparsity out"),
        ("row", 0.5, {}, "whole outputs"),
        ("neuron", 0.5, {}, "whole outputs"),
        ("1x4", 0.5, {"run": 5}, "divides"),
        ([[0, 1], [1, 2]], 0.1, {}, "disjoint"),
        ([[0, 1]], 0.9, {}, "give more sets"),
        ("weight", 0.5, {"solver": "exact"}, "exact_obs"),
        ("weight", 0.5, {"damping": -1.0}, "damping"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_way_out(
    pattern: object, sparsity: float | None, options: dict[str, object], message: str
) -> None:
    W, H, _ = layer(4, 12)
    with pytest.raises(OptionError, match=message):
        prune(W, H, pattern, sparsity, **options)


def test_inputs_are_not_changed() -> None:
    W, H, _ = layer(4, 12)
    before = W.clone(), H.clone()
    prune(W, H, "weight", 0.5)
    assert torch.equal(W, before[0]) and torch.equal(H, before[1])
