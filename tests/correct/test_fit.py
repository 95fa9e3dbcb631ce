# SPDX-License-Identifier: Apache-2.0
"""Training on the reference's outputs: it reaches the least squares that have a closed form, and gives all else back."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from featherweight.correct import fit_outputs, output_error
from featherweight.errors import OptionError
from tests.correct.surroundings import Stopped, bits, call, hooks, pruned, same, stopping, zeros_of
from tests.models import MODELS


def test_one_layer_reaches_the_masked_least_squares_fit() -> None:
    """Oracle: numpy.linalg.lstsq, row by row, on the inputs that are kept."""
    torch.manual_seed(0)
    reference = nn.Linear(8, 3).double()
    model = pruned(reference, 0.5)
    mix = torch.eye(8, dtype=torch.float64) + 0.2 * torch.randn(8, 8, dtype=torch.float64)
    batches = [torch.randn(n, 8, dtype=torch.float64) @ mix + 0.3 for n in (20, 12)]
    x = torch.cat(batches)
    y, inputs = reference(x).detach().numpy(), np.hstack([x.numpy(), np.ones((32, 1))])
    zeros = zeros_of(model)["weight"]
    fit_outputs(model, reference, batches, batches, call, lr=0.03, epochs=300, patience=300, match="layers")
    assert torch.equal(model.weight == 0, zeros)
    for row in range(3):
        kept = np.append((~zeros[row]).numpy(), True)
        best = np.linalg.lstsq(inputs[:, kept], y[:, row], rcond=None)[0]
        got = np.append(model.weight[row].detach().numpy(), float(model.bias[row].detach()))[kept]
        assert np.allclose(got, best, atol=2e-3)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("match", ["both", "layers", "outputs"])
def test_zeros_ties_and_what_is_frozen_stand_while_all_else_moves(kind: str, match: str) -> None:
    torch.manual_seed(0)
    make, inputs = MODELS[kind]
    reference = make()
    model = pruned(reference)
    zeros, before = zeros_of(model), bits(model)
    names = dict(model.named_parameters())
    parameter = next(name for name in names if name.endswith("weight") or name == "kernel")
    data = [inputs(8) for _ in range(3)]
    start = output_error(model, reference, data, call)
    moved = fit_outputs(model, reference, data, data, call, lr=3e-3, epochs=4, frozen=[parameter], match=match)
    after = bits(model)
    assert output_error(model, reference, data, call) < start
    assert all(bool((after[name][zero] == 0).all()) for name, zero in zeros.items())
    assert torch.equal(before[parameter], after[parameter])
    assert parameter not in moved.names and moved.left[parameter] == "is frozen"
    assert {id(p) for p in model.parameters()} == {id(p) for p in names.values()}
    if kind == "tied":
        assert model.head.weight is model.words.weight
    moving = [name for name in moved.names if not torch.equal(before[name], after[name])]
    assert len(moving) >= len(names) - 2
    buffers = {name for name, _ in model.named_buffers()}
    assert same({n: before[n] for n in buffers}, {n: after[n] for n in buffers})


def test_what_was_borrowed_is_given_back() -> None:
    torch.manual_seed(0)
    reference = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(8, 2)
    )
    model = pruned(reference)
    model[4].eval()
    model[0].weight.requires_grad_(False)
    model[4].bias.grad = torch.tensor([1.0, 2.0])
    data = [torch.randn(16, 4)]
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    assert fit_outputs(model, reference, data, data, call, epochs=3).names
    assert torch.equal(random, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True, True]
    assert torch.equal(model[4].bias.grad, torch.tensor([1.0, 2.0])) and model[4].weight.grad is None
    assert all(p.requires_grad and p.grad is None for p in reference.parameters())
    assert hooks(model) + hooks(reference) == 0


def test_work_in_place_after_a_layer_does_not_change_what_it_shall_answer() -> None:
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    data = [torch.randn(16, 4) for _ in range(2)]
    fitted = []
    for in_place in (False, True):
        dense = copy.deepcopy(reference)
        dense[1].inplace = in_place
        model = pruned(dense)
        fit_outputs(model, dense, data, data, call, epochs=3)
        fitted.append(bits(model))
    assert same(*fitted)


def test_a_seed_fixes_the_result_whatever_the_loader_does() -> None:
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    start = pruned(reference)
    loader = DataLoader(TensorDataset(torch.randn(24, 4)), batch_size=8, shuffle=True)
    results = []
    for seed in (0, 0, 1):
        torch.rand(seed + len(results))  # the caller's own random state differs
        model = copy.deepcopy(start)
        fit_outputs(model, reference, loader, loader, lambda m, batch: m(batch[0]), epochs=3, seed=seed)
        results.append(bits(model))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_the_best_state_on_held_out_samples_is_what_stays() -> None:
    """Four samples of sixteen inputs: the fit to them soon harms all others, and is left where it harmed least."""
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
    model = pruned(reference, 0.6)
    few, many = [torch.randn(4, 16)], [torch.randn(200, 16)]
    start = output_error(model, reference, many, call)
    epochs: list[int] = []

    def count(done: int, total: int) -> None:
        epochs.append(done)

    fit_outputs(model, reference, few, many, call, lr=0.02, epochs=200, progress=count)
    assert output_error(model, reference, many, call) <= start
    assert epochs[-1] < 200
    before = bits(model)
    moved = fit_outputs(model, reference, few, many, call, lr=0.5, epochs=10)
    assert moved.names == () and "no epoch" in moved.note
    assert same(before, bits(model))


def test_outputs_without_a_gradient_move_nothing() -> None:
    reference = nn.Linear(4, 2)
    model = pruned(reference)
    before = bits(model)
    data = [torch.randn(8, 4)]
    assert fit_outputs(model, reference, data, data, lambda m, x: m(x).detach(), match="outputs").names == ()
    assert same(before, bits(model))


def test_sparse_gradients_of_embeddings_are_taken_too() -> None:
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 3))
    model = pruned(reference)
    data = [torch.randint(0, 9, (5, 6))]
    assert fit_outputs(model, reference, data, data, call, epochs=3).names


def test_weights_that_a_parametrization_computes_are_left() -> None:
    reference = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))
    model = copy.deepcopy(reference)
    with torch.no_grad():
        model.bias += 1
    data = [torch.randn(8, 4)]
    moved = fit_outputs(model, reference, data, data, call, epochs=2)
    assert moved.names == ("bias",) and "parametrization" in next(iter(moved.left.values()))


@pytest.mark.parametrize("after", [0, 1, 2, 3, 5, 8])
@pytest.mark.parametrize("error", [RuntimeError(), Stopped()])
def test_a_failure_at_any_call_leaves_both_models(after: int, error: BaseException) -> None:
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model = pruned(reference)
    own, dense = bits(model), bits(reference)
    data = [torch.randn(8, 4)] * 2
    with pytest.raises(type(error)):
        fit_outputs(model, reference, data, data, stopping(after, error))
    assert same(own, bits(model)) and same(dense, bits(reference)) and hooks(model) == 0
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "options",
    [{"lr": 0.0}, {"lr": 1.0}, {"epochs": 0}, {"patience": True}, {"match": "layer"}, {"frozen": ["0.wieght"]}],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    data: list[Tensor] = [torch.ones(1, 2)]
    with pytest.raises(OptionError):
        fit_outputs(model, model, data, data, call, **options)
