# SPDX-License-Identifier: Apache-2.0
"""Gradual pruning step by step: exact counts, the right weights, nothing that moves them, and exact resumption."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import featherweight as fw
from featherweight.errors import NothingToCompress, NumericalError, OptionError
from featherweight.state import load_state, save_state
from tests.models import MODELS


def zeros(weight: Tensor) -> int:
    return int((weight == 0).sum())


def is_positive_zero(values: Tensor) -> bool:
    return bool((values.view(torch.int32) == 0).all())


def run(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    pruner: fw.Pruner,
    steps: range,
    inputs: Callable[[int], tuple[Tensor, ...]] = lambda n: (torch.randn(n, 8),),
) -> list[dict[str, Any]]:
    """A loop of the user's own; step t sees the same batch whenever it runs."""
    facts = []
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        out = model(*inputs(4))
        (out - torch.randn_like(out)).square().mean().backward()
        optimizer.step()
        facts.append(pruner.step())
    return facts


def test_a_ramp_has_the_exact_counts_of_equation_1_at_each_update_and_stands_still_after() -> None:
    layer = nn.Linear(8, 30)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    pruner = fw.GradualPruning(0.9, begin=4, end=20, every=5, dense=()).attach(layer, optimizer)
    masks, counts = [], []
    for step in range(26):
        [facts] = run(layer, optimizer, pruner, range(step, step + 1))
        masks.append(layer.weight.detach() == 0)
        counts.append(zeros(layer.weight))
        assert facts == {"sparsity": counts[-1] / 240, "updated": step in (4, 9, 14, 19, 20)}
    expected = {t: round(240 * (0.9 - 0.9 * (1 - (t - 4) / 16) ** 3)) for t in (4, 9, 14, 19, 20)}
    assert [counts[t] for t in expected] == list(expected.values())
    assert counts[:4] == [0] * 4 and counts[20:] == [216] * 6
    assert all(not (earlier & ~later).any() for earlier, later in itertools.pairwise(masks))
    assert all(torch.equal(mask, masks[20]) for mask in masks[20:])


def test_training_is_that_of_the_paper_whose_forward_multiplies_by_a_mask() -> None:
    """Oracle: masks multiplied in by hand, SGD with momentum and decay on the rest, in float64 NumPy."""
    layer = nn.Linear(8, 6, bias=False).double()
    w, velocity, mask = layer.weight.detach().numpy().copy(), np.zeros((6, 8)), np.ones((6, 8))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.02)
    pruner = fw.GradualPruning(0.75, begin=2, end=8, every=3, dense=()).attach(layer, optimizer)
    for t in range(12):
        x, y = torch.randn(4, 8).double(), torch.randn(4, 6).double()
        optimizer.zero_grad()
        (layer(x) - y).square().sum().backward()
        optimizer.step()
        pruner.step()

        error = x.numpy() @ (w * mask).T - y.numpy()
        gradient = (2 * error.T @ x.numpy() + 0.02 * w) * mask
        velocity = (0.9 * velocity + gradient) * mask
        w = w - 0.1 * velocity
        if t in (2, 5, 8):
            count = round(48 * (0.75 - 0.75 * (1 - (t - 2) / 6) ** 3))
            mask.reshape(-1)[np.argsort(abs(w * mask).reshape(-1), kind="stable")[:count]] = 0
            velocity *= mask
        w *= mask
        assert np.allclose(layer.weight.detach().numpy(), w, rtol=1e-9, atol=1e-12)
    assert (w == 0).sum() == 36


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Muon])
def test_pruned_weights_get_no_gradient_no_update_no_momentum_no_decay(make: Any) -> None:
    """Muon turns a masked gradient into a full update: the zeros must be put back."""
    layer = nn.Linear(8, 8, bias=False)
    momentum = {} if make is torch.optim.AdamW else {"momentum": 0.9}
    optimizer = make(layer.parameters(), lr=0.05, weight_decay=0.1, **momentum)
    pruner = fw.GradualPruning(0.5, begin=3, end=3, dense=()).attach(layer, optimizer)
    run(layer, optimizer, pruner, range(8))
    gone = layer.weight == 0
    assert int(gone.sum()) == 32
    assert is_positive_zero(layer.weight.detach()[gone])
    assert is_positive_zero(layer.weight.grad[gone])
    state = optimizer.state[layer.weight]
    for name in ("momentum_buffer", "exp_avg"):
        if name in state:
            assert is_positive_zero(state[name][gone]) and not (state[name][~gone] == 0).any()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("pattern", ["weight", "row"])
def test_every_kind_of_model_trains_to_the_target_and_is_left_as_it_was_found(kind: str, pattern: str) -> None:
    make, inputs = MODELS[kind]
    model = make()
    keys = list(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    options = fw.GradualPruning(0.6, begin=1, end=6, every=2, dense=(), pattern=pattern)
    pruner = options.attach(model, optimizer, inputs(2))
    facts = run(model, optimizer, pruner, range(9), inputs)
    tensors = dict(model.named_parameters())
    pruned = [line for line in pruner.selection if line.action == "pruned"]
    for line in pruned:
        weight = tensors[line.name]
        if pattern == "weight":
            assert zeros(weight) == round(0.6 * weight.numel()), line.name
        elif line.kind != "transposed conv":
            assert int((weight == 0).flatten(1).all(1).sum()) == round(0.6 * len(weight)), line.name
    total = sum(zeros(tensors[line.name]) for line in pruned)
    assert facts[-1]["sparsity"] == pytest.approx(total / sum(line.parameters for line in pruned))
    assert list(model.state_dict()) == keys
    copied = copy.deepcopy(model)
    assert pruner.finalize() == fw.Plan()
    assert not any(p._post_accumulate_grad_hooks for p in (*model.parameters(), *copied.parameters()))
    model.eval()
    copied.eval()
    x = inputs(2)
    assert torch.equal(model(*x), copied(*x))


def test_a_tied_weight_is_pruned_once_and_stays_tied() -> None:
    make, inputs = MODELS["tied"]
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    pruner = fw.GradualPruning(0.5, end=3, every=1, dense=(), layers=["head"]).attach(model, optimizer, inputs(2))
    run(model, optimizer, pruner, range(5), inputs)
    assert model.head.weight is model.words.weight
    assert zeros(model.head.weight) == 48


@pytest.mark.parametrize("schedule", ["cubic", "linear", "constant", "one_shot"])
def test_pruning_again_goes_on_from_the_zeros_that_are_there(schedule: str) -> None:
    """s_i is each layer's own share of zeros, and what is zero is held from the start."""
    model = nn.Sequential(nn.Linear(8, 10), nn.Linear(10, 8))
    model[0].weight.data.view(-1)[:32] = 0  # 40 %
    before = model[0].weight.detach() == 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = fw.GradualPruning(0.8, begin=2, end=10, every=4, schedule=schedule, dense=()).attach(model, optimizer)
    assert pruner.step() == {"sparsity": 0.2, "updated": False}
    run(model, optimizer, pruner, range(1, 7))
    left = {"cubic": (1 - 4 / 8) ** 3, "linear": 1 - 4 / 8}.get(schedule, 0.0)
    assert [zeros(layer.weight) for layer in model] == [round(80 * (0.8 + (s - 0.8) * left)) for s in (0.4, 0.0)]
    assert (model[0].weight[before] == 0).all()
    run(model, optimizer, pruner, range(7, 12))
    assert [zeros(layer.weight) for layer in model] == [64, 64]


def test_an_initial_sparsity_of_your_own_overrules_the_zeros() -> None:
    layer = nn.Linear(8, 10)
    layer.weight.data.view(-1)[:32] = 0
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    options = fw.GradualPruning(0.8, begin=2, end=6, every=2, schedule="linear", initial=0.1, dense=())
    pruner = options.attach(layer, optimizer)
    run(layer, optimizer, pruner, range(2))
    assert zeros(layer.weight) == 0  # nothing was held, so they grew again
    counts = [run(layer, optimizer, pruner, range(t, t + 1)) and zeros(layer.weight) for t in range(2, 7)]
    assert counts == [8, 8, 36, 36, 64]


def test_more_zeros_than_the_target_are_kept_and_hold() -> None:
    layer = nn.Linear(8, 10)
    layer.weight.data.view(-1)[:60] = 0
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    pruner = fw.GradualPruning(0.5, end=4, every=1, dense=()).attach(layer, optimizer)
    assert [facts["sparsity"] for facts in run(layer, optimizer, pruner, range(6))] == [0.75] * 6
    assert "75.0% are zero already" in pruner.selection[0].reason


def test_scattered_zeros_hold_while_whole_tiles_are_pruned() -> None:
    """What an earlier stage made stays zero, also where it is no tile."""
    layer = nn.Linear(8, 10)
    layer.weight.data[:, ::3] = 0
    before = layer.weight.detach() == 0
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    pruner = fw.GradualPruning(0.5, begin=1, end=4, every=1, pattern="1x4", dense=()).attach(layer, optimizer)
    facts = run(layer, optimizer, pruner, range(8))
    assert (layer.weight[before] == 0).all()
    assert int((layer.weight == 0).view(10, 2, 4).all(2).sum()) == 10
    assert facts[-1]["sparsity"] == zeros(layer.weight) / 80


def test_n_of_m_grows_until_every_group_keeps_n() -> None:
    conv = nn.Conv2d(8, 6, 3)
    before = conv.weight.detach().abs().permute(0, 2, 3, 1).reshape(-1, 4)
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.0)
    pruner = fw.GradualPruning(pattern="1:4", begin=0, end=8, every=2, schedule="linear", dense=()).attach(
        conv, optimizer
    )
    low = before.argsort(dim=1).argsort(dim=1) < 3
    for step in range(10):
        run(conv, optimizer, pruner, range(step, step + 1), lambda n: (torch.randn(n, 8, 4, 4),))
        gone = (conv.weight == 0).permute(0, 2, 3, 1).reshape(-1, 4)
        expected = round(432 * 0.75 * min(step // 2 * 2, 8) / 8)
        assert int(gone.sum()) == expected
        assert (gone <= low).all()  # only the lowest 3 of each 4
        if 0 < expected < 324:
            assert before[gone].max() <= before[low & ~gone].min()  # the lowest of all those go first
    assert (gone.sum(1) == 3).all()
    assert pruner.finalize().formats == {"weight": "nm:1:4:1"}


def test_n_of_m_stopped_half_way_gets_no_hint() -> None:
    layer = nn.Linear(8, 4)
    pruner = fw.GradualPruning(pattern="2:4", end=10, every=1, dense=()).attach(layer)
    pruner.step()
    pruner.step()
    assert pruner.finalize() == fw.Plan()


def test_global_ranking_has_one_threshold_and_honours_caps() -> None:
    model = nn.Sequential(nn.Linear(8, 10), nn.Linear(10, 6), nn.Linear(6, 4))
    model[2].weight.data *= 0.05
    magnitudes = [layer.weight.detach().abs() for layer in model]
    joined = torch.cat([m.flatten() for m in magnitudes])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = fw.GradualPruning(0.5, end=0, ranking="global", dense=()).attach(model, optimizer)
    run(model, optimizer, pruner, range(2))
    threshold = joined.sort().values[round(0.5 * len(joined)) - 1]
    for layer, m in zip(model, magnitudes, strict=True):
        expected = m <= threshold
        if layer is model[2]:
            expected[m.argmax() // 6, m.argmax() % 6] = False  # one always stays...
        assert int(((layer.weight == 0) != expected).sum()) <= 1  # ...and one elsewhere goes for it
    assert sum(zeros(layer.weight) for layer in model) == 82

    model = nn.Sequential(nn.Linear(8, 10), nn.Linear(10, 6), nn.Linear(6, 4))
    model[2].weight.data *= 0.05
    options = fw.GradualPruning(0.5, end=0, ranking="global", caps={"2": 0.25, "*.weight": 0.6, "0": 0.4}, dense=())
    with pytest.raises(OptionError, match="'2' decides nothing"):
        options.attach(model)
    options = fw.GradualPruning(0.5, end=0, ranking="global", caps={"*": 0.62, "2": 0.25}, dense=())
    options.attach(model).step()
    counts = [zeros(layer.weight) for layer in model]
    assert sum(counts) == 82 and counts[2] == 6 and counts[0] <= 49 and counts[1] <= 37


@pytest.mark.parametrize(("pattern", "half"), [("row", 8), ("column", 6), ("1x4", 2), ("2:4", 0.5), ("neuron", 6)])
def test_global_ranking_meets_the_share_of_all_weights_in_every_pattern(pattern: str, half: float) -> None:
    """To within half of the largest unit, and from then on exactly so."""
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    options: dict[str, Any] = {"dense": ()} if pattern != "neuron" else {}
    options |= {"pattern": pattern, "ranking": "global", "importance": "group_l2", "sparsity": 0.5}
    pruner = fw.GradualPruning(end=4, every=2, **options).attach(model, None, (torch.zeros(1, 8),))
    for _ in range(6):
        facts = pruner.step()
    own = [model[0], model[2]] if pattern == "neuron" else [model[0], model[2], model[4]]
    total = sum(layer.weight.numel() for layer in own)
    if pattern == "neuron":  # counted by rows; columns come on top
        gone = sum(int((layer.weight == 0).all(1).sum()) * layer.in_features for layer in own)
    else:
        gone = sum(zeros(layer.weight) for layer in own)
        assert facts["sparsity"] == gone / total
    assert abs(gone - total / 2) <= half


def test_caps_that_leave_too_little_are_refused_with_what_they_leave() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    model[0].weight.data[0, :5] = 0
    options = fw.GradualPruning(0.9, ranking="global", caps={"*": 0.95, "1": 0.5}, dense=())
    message = (
        r"sparsity=0.9 of 200 weights is 180 zeros, but caps let go of 145 at most "
        r"\(1.weight 50 of 100, 0.weight 95 of 100\). Raise the caps, or give sparsity=0.725 or less"
    )
    with pytest.raises(OptionError, match=message):
        options.attach(model)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_layers_have_targets_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(8, 10), nn.Linear(10, 10), nn.Linear(10, 4))
    pruner = fw.GradualPruning({"*": 0.8, "1": 0.25}, end=0, dense=()).attach(model)
    pruner.step()
    assert [zeros(layer.weight) for layer in model] == [64, 25, 32]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_at_attach_and_at_each_update(bad: float) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    options = fw.GradualPruning(0.5, end=4, every=2, dense=())
    pruner = options.attach(model)
    pruner.step()
    model[1].weight.data[0, 0] = bad
    pruner.step()
    masks = copy.deepcopy(pruner.state_dict()["masks"])
    with pytest.raises(NumericalError, match=r"1.weight has 1 of 16 values that are NaN or infinite at step 2"):
        pruner.step()
    assert all(torch.equal(mask, masks[name]) for name, mask in pruner.state_dict()["masks"].items())
    with pytest.raises(NumericalError, match=r"1.weight has 1 of 16 values.*at attach"):
        options.attach(model)


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.8},
        {"sparsity": 0.8, "importance": "gradient"},
        {"sparsity": 0.8, "importance": "movement", "ranking": "global"},
        {"sparsity": 0.8, "importance": "random", "seed": 3},
        {"pattern": "2:4", "importance": "gradient"},
        {"sparsity": 0.5, "pattern": "neuron", "importance": "gradient"},
        {"sparsity": 0.5, "initial": 0.2, "schedule": "linear"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.parametrize("stop", [5, 9])
def test_a_resumed_run_ends_in_the_same_bits(options: dict[str, Any], stop: int, tmp_path: Path) -> None:
    """Stops in the middle of an interval, saves to a file, goes on with fresh objects, attached before or after loading."""
    method = fw.GradualPruning(begin=2, end=13, every=4, dense=(), **options)

    def make(state: Any = None) -> tuple[nn.Module, torch.optim.Optimizer, fw.Pruner]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        model[0].weight.data.view(-1)[::9] = 0
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        if state is not None:
            model.load_state_dict(state)
        return model, optimizer, method.attach(model, optimizer, (torch.zeros(1, 8),))

    model, optimizer, pruner = make()
    facts = run(model, optimizer, pruner, range(18))

    first, its_optimizer, its_pruner = make()
    run(first, its_optimizer, its_pruner, range(stop))
    state = {"model": first.state_dict(), "optimizer": its_optimizer.state_dict(), "pruner": its_pruner.state_dict()}
    save_state(tmp_path / "state", state)
    state = load_state(tmp_path / "state")

    again, optimizer_again, pruner_again = make(state["model"] if stop == 9 else None)
    pruner_again.load_state_dict(state["pruner"])
    again.load_state_dict(state["model"])
    optimizer_again.load_state_dict(state["optimizer"])
    assert run(again, optimizer_again, pruner_again, range(stop, 18)) == facts[stop:]
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    for mine, other in zip(optimizer.state.values(), optimizer_again.state.values(), strict=True):
        assert all(torch.equal(mine[key], other[key]) for key in mine)


def test_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    options = fw.GradualPruning(0.5, end=2, every=1, dense=())
    pruner = options.attach(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4)))
    for _ in range(3):
        pruner.step()
    state = pruner.state_dict()
    fresh = options.attach(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4)))
    other = options.attach(nn.ModuleDict({"a": nn.Linear(8, 4)}))
    with pytest.raises(OptionError, match=r"of other layers or options \(different: 0.weight, 1.weight, a.weight\)"):
        other.load_state_dict(state)
    with pytest.raises(OptionError, match=r"saved mask of 0.weight is Tensor\[2\] bool; the model has \[4, 8\]"):
        fresh.load_state_dict(state | {"masks": {"0.weight": torch.ones(2, dtype=torch.bool)}})
    with pytest.raises(OptionError, match="has version 7; this one reads 1"):
        fresh.load_state_dict(state | {"version": 7})
    assert fresh.state_dict()["step"] == 0 and fresh.state_dict()["masks"] == {}


def test_finalize_lets_go_and_is_the_end() -> None:
    layer = nn.Linear(8, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    pruner = fw.GradualPruning(0.5, end=0, importance="gradient", dense=()).attach(layer, optimizer)
    run(layer, optimizer, pruner, range(2))
    assert zeros(layer.weight) == 16
    assert pruner.finalize() == pruner.finalize() == fw.Plan()
    assert not layer.weight._post_accumulate_grad_hooks and not optimizer._optimizer_step_pre_hooks
    with pytest.raises(OptionError, match="has been finalized"):
        pruner.step()
    layer(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    assert zeros(layer.weight) == 0


def test_what_cannot_be_attached_leaves_no_trace() -> None:
    layer = nn.Linear(8, 4)
    layer.weight.data[0] = 0
    for options in ({"keep": ["*"]}, {"pattern": "1x3"}):
        with pytest.raises(NothingToCompress):
            fw.GradualPruning(0.5, dense=(), **options).attach(layer)
    with pytest.raises(OptionError, match=r"the optimizer is str, not a torch.optim.Optimizer"):
        fw.GradualPruning(0.5, dense=()).attach(layer, "sgd")  # type: ignore[arg-type]
    assert not layer.weight._post_accumulate_grad_hooks


def test_zeros_that_a_padding_index_keeps_count_but_alone_are_no_start() -> None:
    words = nn.Embedding(10, 4, padding_idx=0)
    pruner = fw.GradualPruning(0.5, begin=1, end=1, dense=()).attach(words)
    assert pruner.step()["sparsity"] == 0.0
    pruner.step()
    assert zeros(words.weight) == 20 and (words.weight[0] == 0).all()
