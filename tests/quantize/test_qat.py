# SPDX-License-Identifier: Apache-2.0
"""Training on learned grids: the paper's trajectory, every kind of layer, what is left behind, and exact resumption."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import Tensor, nn

import featherweight as fw
from featherweight.edits import FakeQuantize
from featherweight.errors import NothingToCompress, NumericalError, OptionError
from featherweight.grids import GridSpec, fit_grid, read_grid
from featherweight.layers import to_matrix, weights
from featherweight.state import load_state, save_state
from tests.models import MODELS
from tests.quantize.two_quantizers import quantize_on_rank

Data = Callable[[int], tuple[Tensor, ...]]


def eight(n: int) -> tuple[Tensor, ...]:
    return (torch.randn(n, 8),)


def run(model: nn.Module, optimizer: Any, hook: Any, steps: range, inputs: Data = eight, micro: int = 1) -> list[float]:
    """A loop of the user's own; step t sees the same batch whenever it runs, in `micro` pieces."""
    losses = []
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        for _ in range(micro):
            out = model(*inputs(4))
            loss = (out - torch.randn_like(out)).square().mean() / micro
            loss.backward()
        optimizer.step()
        hook.step()
        losses.append(float(loss.detach()))
    return losses


class Lsq(nn.Module):
    """LSQ as its paper writes it, by autograd: the step's gradient scaled, rounding detached. The oracle."""

    def __init__(self, layer: nn.Linear, step: Tensor, bits: int, input_step: float | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().clone())
        self.bias = nn.Parameter(layer.bias.detach().clone())
        self.step = nn.Parameter(step.clone())
        self.bits = bits
        self.input_step = None if input_step is None else nn.Parameter(torch.tensor(input_step, dtype=step.dtype))

    def forward(self, x: Tensor) -> Tensor:
        if self.input_step is not None:  # what reads a ReLU: no negative values
            x = rounded(x, self.input_step, 0, 2**4 - 1, x[0].numel())
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        count = self.weight.numel() // self.step.numel()
        return nn.functional.linear(x, rounded(self.weight, self.step, low, high, count), self.bias)


def rounded(v: Tensor, step: Tensor, low: int, high: int, count: int) -> Tensor:
    scale = 1 / math.sqrt(count * high)
    s = step * scale + (step - step * scale).detach()  # gradscale of the paper's appendix
    bounded = (v / s).clamp(low, high)
    return (bounded + (bounded.round() - bounded).detach()) * s


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("per", ["row", "tensor"])
def test_training_is_that_of_the_paper(per: str, micro: int) -> None:
    """SGD with momentum in float64, with accumulated gradients too: weights, steps and the inputs' step as LSQ has them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 5)).double()
    model[2].weight.data[:, ::3] *= 4  # some are out of the grid's range
    oracle = copy.deepcopy(model)
    options = fw.QAT(bits=3, per=per, activation_bits=4, start="lsq", keep=["0"])
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.003, momentum=0.9
    )  # at 0.05 the paper's own step falls below 0
    hook = options.attach(model, optimizer)

    torch.manual_seed(0)  # run's first batch
    x = oracle[1](oracle[0](eight(4)[0].double()))
    mean = oracle[2].weight.abs().mean(1, keepdim=True) if per == "row" else oracle[2].weight.abs().mean()[None, None]
    step = (2 * mean / math.sqrt(3)).detach()
    oracle[2] = Lsq(oracle[2], step.float().double(), 3, float((2 * x.detach().abs().mean() / math.sqrt(15)).float()))
    groups = [{"params": [p for n, p in oracle.named_parameters()]}]
    theirs = torch.optim.SGD(groups, lr=0.003, momentum=0.9)

    def double(n: int) -> tuple[Tensor, ...]:
        return (torch.randn(n, 8).double(),)

    class Still:
        def step(self) -> None:
            pass

    for t in range(12):
        ours = run(model, optimizer, hook, range(t, t + 1), double, micro)
        assert ours == pytest.approx(run(oracle, theirs, Still(), range(t, t + 1), double, micro), rel=1e-5), t
    assert torch.allclose(hook.state_dict()["weights"]["2.weight"]["full"], oracle[2].weight, rtol=1e-5, atol=1e-7)
    scale = model[2].input_grid.scale
    assert float(scale) == pytest.approx(float(oracle[2].input_step.detach()), rel=1e-5)
    assert float(scale) != pytest.approx(float(hook.state_dict()["inputs"]["2"]["start"]), rel=1e-3)  # it did learn
    assert torch.allclose(model[0].weight, oracle[0].weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_model_trains_and_ends_on_grids_that_are_read_from_its_values(kind: str, bits: int) -> None:
    make, inputs = MODELS[kind]
    torch.manual_seed(0)
    model = make()
    keys = set(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    hook = fw.QAT(bits=bits, fold="never").attach(model, optimizer, inputs(2))
    losses = run(model, optimizer, hook, range(8), inputs)
    assert all(map(math.isfinite, losses))
    copied = copy.deepcopy(model)
    plan = hook.finalize()
    chosen = {line.name for line in hook.selection if line.action == "quantized"}
    for weight in weights(model)[0]:
        found = read_grid(to_matrix(weight, weight.parameter.detach()), most_bits=bits)
        assert (found is not None) == (weight.name in chosen), weight.name
        if found is not None:
            assert not found.zero_point.any()
    added = {f"{edit.layer}.input_grid.{leaf}" for edit in plan.edits for leaf in ("scale", "zero_point")}
    assert set(model.state_dict()) == keys | added
    model.eval()
    copied.eval()
    x = inputs(2)
    assert torch.equal(model(*x), copied(*x))
    assert not any(m._forward_hooks or (m._forward_pre_hooks and isinstance(m, FakeQuantize)) for m in model.modules())
    assert not optimizer._optimizer_step_pre_hooks
    again = make()
    for edit in plan.edits:
        fw.apply(again, edit)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(*x), model(*x))


def test_the_model_is_rounded_whenever_it_runs_and_full_precision_between_optimizer_and_hook() -> None:
    layer = nn.Linear(8, 6)
    start = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-6)
    hook = fw.QAT(bits=2, activation_bits=None).attach(layer, optimizer)
    before = layer.weight.detach().clone()
    assert len(before[0].unique()) <= 4
    layer(torch.randn(4, 8)).sum().backward()
    assert torch.equal(layer.weight.detach(), before)
    optimizer.step()
    assert torch.allclose(layer.weight, start, atol=1e-4) and not torch.equal(layer.weight.detach(), before)
    hook.step()
    assert len(layer.weight.detach()[0].unique()) <= 4
    layer.eval()
    with torch.no_grad():
        assert len(layer.weight[0].unique()) <= 4


def test_an_optimizer_step_without_the_hooks_is_refused() -> None:
    layer = nn.Linear(8, 6)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    fw.QAT(bits=4).attach(layer, optimizer)
    layer(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    with pytest.raises(OptionError, match=r"twice without step\(\)"):
        optimizer.step()


def test_a_tied_weight_is_one_and_stays_tied() -> None:
    make, inputs = MODELS["tied"]
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    hook = fw.QAT(bits=4).attach(model, optimizer)
    run(model, optimizer, hook, range(3), inputs)
    assert model.head.weight is model.words.weight
    assert [edit.layer for edit in hook.finalize().edits] == ["head", "mix"]  # an embedding's input is indices


class Twice(nn.Module):
    """One layer called twice: both calls' gradients count."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(torch.relu(self.shared(x)))


def test_a_shared_layer_gets_the_gradients_of_all_its_calls() -> None:
    """Oracle: the same product of two, with a copy of the layer for each call, gradients added by hand."""
    torch.manual_seed(1)
    model = Twice()
    model.shared.weight.data[:, ::3] *= 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    hook = fw.QAT(bits=3, activation_bits=None, start="lsq").attach(model, optimizer)
    x = eight(5)[0]
    model(x).square().sum().backward()
    gradient = model.shared.weight.grad.clone()
    state = hook.state_dict()["weights"]["shared.weight"]
    full, step = state["full"], state["start"]
    first, second = (full.clone().requires_grad_() for _ in range(2))
    steps = [step.clone().requires_grad_() for _ in range(2)]
    bias = model.shared.bias.detach()
    for_first, for_second = (rounded(w, s, -4, 3, 8) for w, s in zip((first, second), steps, strict=True))
    linear = nn.functional.linear
    linear(torch.relu(linear(x, for_first, bias)), for_second, bias).square().sum().backward()
    optimizer.step()  # turns the rounded weight's gradient into LSQ's two
    assert not torch.equal(model.shared.weight.grad, gradient)  # what is out of range was masked
    assert torch.allclose(model.shared.weight.grad, first.grad + second.grad, rtol=1e-4, atol=1e-5)
    factor = optimizer.param_groups[-1]["params"][0]
    assert torch.allclose(factor.grad * step, steps[0].grad + steps[1].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ["pruner first", "quantizer first"])
def test_pruned_weights_stay_zero_and_gradual_pruning_sees_full_precision(order: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 30), nn.ReLU(), nn.Linear(30, 6))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    pruner = fw.GradualPruning(0.5, begin=2, end=8, every=3, dense=(), initial=0.0).attach(model, optimizer)
    hook = fw.QAT(bits=3).attach(model, optimizer)
    both = (pruner, hook) if order == "pruner first" else (hook, pruner)
    for step in range(14):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(*eight(4)).square().mean().backward()
        optimizer.step()
        for one in both:
            one.step()
    masks = pruner.state_dict()["masks"]
    pruner.finalize()
    hook.finalize()
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert int(mask.sum()) == weight.numel() // 2
        assert (weight[mask] == 0).all()
        if order == "pruner first":  # all values are ranked, not 8 levels; what is behind a pruned one is zero too
            full = hook.state_dict()["weights"][name]["full"]
            assert (full[mask] == 0).all() and (full[~mask] != 0).all()


def test_train_prunes_and_quantizes_together_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    data = [(torch.randn(4, 3, 8, 8), torch.randn(4, 6)) for _ in range(4)]

    class Stop(Exception):
        pass

    def report(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == 8 and stop:
            raise Stop

    def train(folder: Path, resume: bool) -> tuple[nn.Module, fw.Plan]:
        torch.manual_seed(3)
        model = MODELS["residual"][0]()
        task = fw.Task(model, (data[0][0],), train=data, loss=lambda out, batch: (out - batch[1]).square().mean())
        pruning = fw.GradualPruning(0.5, begin=1, end=9, every=2, dense=())
        method = fw.Train(steps=12, hooks=[pruning, fw.QAT(bits=4)], checkpoint_every=3, lr=0.01)
        folder.mkdir(exist_ok=True)
        return model, method(model, task, fw.Stage(folder=folder, resume=resume, report=report))

    stop = False
    whole, plan = train(tmp_path / "a", resume=False)
    stop = True
    with pytest.raises(Stop):
        train(tmp_path / "b", resume=False)
    stop = False
    again, _ = train(tmp_path / "b", resume=True)
    assert any(isinstance(edit, fw.Fold) for edit in plan.edits)
    assert list(whole.state_dict()) == list(again.state_dict())
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    share = float((whole.a.weight == 0).float().mean())
    assert share >= 0.5


def test_a_state_saved_and_loaded_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    def fresh() -> tuple[nn.Module, Any, Any]:
        torch.manual_seed(0)
        model = MODELS["mlp"][0]()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        return model, optimizer, fw.QAT(bits=3).attach(model, optimizer)

    model, optimizer, hook = fresh()
    run(model, optimizer, hook, range(5))
    save_state(tmp_path / "s", {"m": dict(model.state_dict()), "o": optimizer.state_dict(), "h": hook.state_dict()})
    run(model, optimizer, hook, range(5, 10))
    other, again, resumed = fresh()
    state = load_state(tmp_path / "s")
    other.load_state_dict(state["m"])
    again.load_state_dict(state["o"])
    resumed.load_state_dict(state["h"])
    run(other, again, resumed, range(5, 10))
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name

    wrong = fw.QAT(bits=3, keep=["fc"]).attach(MODELS["mlp"][0](), torch.optim.SGD([torch.zeros(1).requires_grad_()]))
    with pytest.raises(OptionError, match=r"other weights \(different: fc.weight\)"):
        wrong.load_state_dict(state["h"])
    per_tensor = fw.QAT(bits=3, per="tensor").attach(
        MODELS["mlp"][0](), torch.optim.SGD([torch.zeros(1).requires_grad_()])
    )
    with pytest.raises(OptionError, match=r"with 16 steps; the model's is .* with 1"):
        per_tensor.load_state_dict(state["h"])


def test_a_closure_sees_the_rounded_model_and_trains_to_the_same_weights() -> None:
    def train(by_closure: bool) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Linear(8, 4)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        hook = fw.QAT(bits=2).attach(model, optimizer)
        x = torch.randn(16, 8)

        def closure() -> Tensor:
            optimizer.zero_grad()
            assert len(model.weight.detach()[0].unique()) <= 4
            loss = (model(x) - 1).square().mean()
            loss.backward()
            return loss

        for _ in range(6):
            if by_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
            hook.step()
        hook.finalize()
        return model

    one, other = train(True), train(False)
    assert torch.equal(one.weight, other.weight) and torch.equal(one.input_grid.scale, other.input_grid.scale)


def test_lbfgs_evaluates_rounded_weights_each_time() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    optimizer = torch.optim.LBFGS([{"params": list(model.parameters())}], lr=0.1, max_iter=4)
    with pytest.raises(OptionError, match="learn=False"):
        fw.QAT(bits=4).attach(model, optimizer)
    hook = fw.QAT(bits=4, learn=False).attach(model, optimizer)
    seen = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        seen.append(len(model.weight.detach()[0].unique()) <= 16)
        loss = (model(torch.ones(2, 8)) - 1).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    hook.step()
    assert len(seen) >= 2 and all(seen)


def test_a_step_that_a_loss_scaler_skips_changes_nothing() -> None:
    layer = nn.Linear(8, 6)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    hook = fw.QAT(bits=4).attach(layer, optimizer)
    for infinite in (False, True, False):
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        factor = optimizer.param_groups[-1]["params"][0].detach().clone()
        optimizer.zero_grad()
        loss = layer(torch.randn(4, 8)).square().mean()
        scaler.scale(loss * (float("inf") if infinite else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        hook.step()
        if infinite:
            assert torch.equal(before["weight"], layer.weight)
            assert torch.equal(optimizer.param_groups[-1]["params"][0], factor)
        else:
            assert not torch.equal(optimizer.param_groups[-1]["params"][0], factor)


@pytest.mark.parametrize("precision", ["bf16", "no"])
@pytest.mark.parametrize("kind", ["recurrent", "transformer", "residual"])
def test_train_runs_it_in_mixed_precision_beside_a_teacher(kind: str, precision: str) -> None:
    torch.manual_seed(0)
    make, inputs = MODELS[kind]
    model = make()
    data = [(*inputs(4), torch.randn(4, 6)) for _ in range(3)]
    task = fw.Task(make(), inputs(2), train=data, loss=lambda out, batch: (out - batch[-1]).square().mean())
    plan = fw.Train(steps=4, hooks=[fw.QAT(bits=4)], distill=fw.KL(), precision=precision, lr=0.01)(
        model, task, fw.Stage()
    )
    names = {edit.layer for edit in plan.edits if isinstance(edit, fw.FakeQuant)}
    assert "head" in names
    grid = model.head.input_grid
    assert float(grid.scale) != 1.0


def test_what_lies_on_a_grid_already_begins_there() -> None:
    """As after a `Quantize` or `Reconstruct` stage: nothing moves by attaching."""
    layer = nn.Linear(8, 6)
    with torch.no_grad():
        layer.weight.copy_(fit_grid(layer.weight, GridSpec(4, symmetric=True, search="minmax")).nearest(layer.weight))
    fw.apply(layer, fw.FakeQuant("", 6, symmetric=True))
    layer.input_grid.scale.fill_(0.125)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    hook = fw.QAT(bits=4, start="lsq").attach(layer, optimizer)
    layer(torch.randn(2, 8))
    assert all(torch.equal(value, layer.state_dict()[name]) for name, value in before.items())
    run(layer, optimizer, hook, range(3))
    assert not torch.equal(layer.input_grid.scale, before["input_grid.scale"])
    assert hook.finalize() == fw.Plan()


def test_norms_are_folded_first_and_the_new_bias_is_trained() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    model[1].running_var.uniform_(0.1, 3)
    model[1].running_mean.normal_()
    x = torch.randn(4, 3, 8, 8)
    dense = model.eval()(x).detach()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.3)
    hook = fw.QAT(bits=8, activation_bits=None, fold="first").attach(model, optimizer, (x,))
    assert isinstance(model[1], nn.Identity)
    assert float((model(x).detach() - dense).abs().max() / dense.abs().max()) < 0.02
    assert optimizer.param_groups[-2]["params"] == [model[0].bias]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3, 0.0]
    before = model[0].bias.detach().clone()
    run(model, optimizer, hook, range(2), lambda n: (torch.randn(n, 3, 8, 8),))
    assert not torch.equal(before, model[0].bias)

    without = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    hook = fw.QAT(fold="first").attach(without, torch.optim.SGD(without.parameters(), lr=0.1))
    assert any("BatchNorm was not folded" in event["text"] for event in hook.events)


@pytest.mark.parametrize(
    "make", [lambda: nn.Conv2d(3, 8, 3, bias=False), lambda: nn.ConvTranspose2d(3, 8, 3), lambda: nn.Conv2d(3, 8, 3)]
)
def test_norms_folded_last_train_as_norms_and_leave_symmetric_grids_and_the_same_answers(make: Any) -> None:
    """Half of the norm's factors are below zero, which a symmetric grid cannot follow: signs change sides before."""
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with torch.no_grad():
        model[1].weight.uniform_(0.3, 2).mul_(torch.tensor([1.0, -1.0] * 4))
        model[1].bias.normal_()
        model[1].running_var.uniform_(0.1, 3)
        model[1].running_mean.normal_()
    x = torch.randn(4, 3, 8, 8)
    dense = model.eval()(x).detach()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    hook = fw.QAT(bits=8, activation_bits=None).attach(model, optimizer, (x,))
    assert bool((model[1].weight > 0).all())
    assert float((model(x).detach() - dense).abs().max() / dense.abs().max()) < 0.02
    model.train()
    before = model[1].running_mean.clone()
    run(model, optimizer, hook, range(4), lambda n: (torch.randn(n, 3, 8, 8),))
    assert not torch.equal(model[1].running_mean, before)
    unfolded = model.eval()(x).detach()
    plan = hook.finalize()
    assert [type(edit) for edit in plan.edits] == [fw.Fold] and isinstance(model[1], nn.Identity)
    assert torch.allclose(model(x), unfolded, rtol=1e-4, atol=1e-5)
    for weight in weights(model)[0]:
        found = read_grid(to_matrix(weight, weight.parameter.detach()))
        assert found is not None and found.bits <= 8 and not found.zero_point.any(), weight.name


def test_one_step_for_a_tensor_folds_norms_first() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    fw.QAT(per="tensor").attach(model, torch.optim.SGD(model.parameters()), (torch.randn(2, 3, 4, 4),))
    assert isinstance(model[1], nn.Identity)


def test_norms_that_stay_can_be_frozen_from_a_step_on() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    hook = fw.QAT(fold="never", freeze_norms=2).attach(model, optimizer)
    means = []
    for step in range(4):
        model.train()
        run(model, optimizer, hook, range(step, step + 1), lambda n: (torch.randn(n, 3, 8, 8),))
        means.append(model[1].running_mean.clone())
    assert not torch.equal(means[0], means[1]) and torch.equal(means[1], means[2]) and torch.equal(means[2], means[3])
    hook.finalize()
    model.train()
    model(torch.randn(4, 3, 8, 8))
    assert not torch.equal(model[1].running_mean, means[3])


@pytest.mark.parametrize(("symmetric", "shift", "zero_point"), [(False, 0.0, -8), (True, 0.0, 0), (False, -0.5, None)])
def test_inputs_that_are_never_negative_use_all_integers_and_others_learn_their_zero_point(
    symmetric: bool, shift: float, zero_point: int | None
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 6)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    hook = fw.QAT(bits=8, activation_bits=4, activation_symmetric=symmetric, start="lsq").attach(layer, optimizer)
    seen = [int(layer.input_grid.zero_point)]
    for step in range(20):
        run(layer, optimizer, hook, range(step, step + 1), lambda n: (torch.rand(n, 8) + shift,))
        seen.append(int(layer.input_grid.zero_point))
    if zero_point is not None:
        assert set(seen[1:]) == {zero_point}
    else:
        assert len(set(seen[1:])) > 1 and all(-8 <= z <= 7 for z in seen)
    values = layer.input_grid(torch.rand(1000) + shift)
    assert (values == 0).any() or zero_point is not None


def test_a_first_batch_of_zeros_or_nan_does_not_set_a_grid() -> None:
    layer = nn.Linear(8, 6)
    hook = fw.QAT().attach(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
    layer(torch.zeros(2, 8))
    assert float(layer.input_grid.scale) == 1.0
    with pytest.raises(NumericalError, match="first batch"):
        layer(torch.full((2, 8), float("nan")))
    layer(torch.ones(2, 8))
    assert float(layer.input_grid.scale) == pytest.approx(1 / 255, rel=0.01)
    hook.finalize()


def test_what_cannot_be_quantized_is_kept_or_refused_and_the_model_is_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    nn.init.zeros_(model[1].weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reasons = {line.name: line.reason for line in fw.QAT().select(model)}
    assert "all zeros" in reasons["1.weight"]
    model[2].weight.data[0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NumericalError, match=r"2\.weight has 1 of 8 values"):
        fw.QAT().attach(model, optimizer)
    assert list(model.state_dict()) == list(before) and not optimizer._optimizer_step_pre_hooks
    with pytest.raises(NothingToCompress, match="Nothing to quantize"):
        fw.QAT(keep=["*"]).attach(nn.Linear(2, 2), optimizer)
    with pytest.raises(OptionError, match=r"attach\(model, optimizer\)"):
        fw.QAT().attach(nn.Linear(2, 2), None)  # type: ignore[arg-type]


def test_a_step_never_falls_to_zero_or_below() -> None:
    """LSQ as it is written lets it, and all values change sign."""
    layer = nn.Linear(8, 6)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    hook = fw.QAT(bits=4).attach(layer, optimizer)
    run(layer, optimizer, hook, range(1))
    learned = optimizer.param_groups[-1]["params"]
    layer(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    with torch.no_grad():
        for parameter in learned[:2]:
            parameter.fill_(-1.0)
    hook.step()
    assert all(bool((parameter > 0).all()) for parameter in learned[:2])
    assert float(layer.input_grid.scale) > 0 and bool(layer.weight.isfinite().all())


def test_a_row_of_zeros_may_come_to_life_and_constant_rows_are_exact() -> None:
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight[0] = 0.0
        layer.weight[1] = 0.25
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    hook = fw.QAT(bits=4, activation_bits=None).attach(layer, optimizer)
    assert torch.allclose(layer.weight[1], torch.full((4,), 0.25), rtol=1e-6)
    for _ in range(10):
        optimizer.zero_grad()
        (layer(torch.eye(4)) - 1).square().sum().backward()
        optimizer.step()
        hook.step()
    assert (layer.weight[0] != 0).any()


def test_two_processes_learn_the_same_steps_though_their_data_differ(tmp_path: Path) -> None:
    # A server that has imported everything forks both: half the imports, and none of this process's threads.
    mp.get_context("forkserver").set_forkserver_preload(["tests.quantize.two_quantizers"])
    mp.start_processes(quantize_on_rank, args=(str(tmp_path),), nprocs=2, start_method="forkserver")
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert float(first["0.input_grid.scale"]) != 1.0


def test_folding_inside_distributed_data_parallel_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    wrapped = object.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = model
    with pytest.raises(OptionError, match="before wrapping"):
        fw.QAT(fold="first").attach(wrapped, torch.optim.SGD(model.parameters()), (torch.zeros(2, 4),))


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_trains_to_the_same_weights() -> None:
    def train(compiles: bool) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 5))
        called = torch.compile(model, backend="eager") if compiles else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        hook = fw.QAT(bits=3, activation_bits=4).attach(called, optimizer)
        run(called, optimizer, hook, range(5))
        hook.finalize()
        return model

    one, other = train(False), train(True)
    for name, value in one.state_dict().items():
        assert torch.allclose(value, other.state_dict()[name], rtol=1e-5, atol=1e-6), name


def test_an_average_of_weights_taken_between_optimizer_and_hook_is_of_full_precision() -> None:
    layer = nn.Linear(8, 6)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    average = torch.optim.swa_utils.AveragedModel(layer)
    hook = fw.QAT(bits=2, activation_bits=None).attach(layer, optimizer)
    seen = []
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        average.update_parameters(layer)
        hook.step()
        seen.append(hook.state_dict()["weights"]["weight"]["full"])
    assert torch.allclose(average.module.weight, torch.stack(seen).mean(0), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bits": 1}, "bits must be a whole number from 2 to 8; got 1"),
        ({"bits": True}, "bits must be"),
        ({"bits": {"fc": 9}}, "bits of 'fc'"),
        ({"bits": {}}, "empty mapping"),
        ({"activation_bits": 0}, "activation_bits"),
        ({"per": "channel"}, "per 'channel' is none of row, tensor"),
        ({"start": "max"}, "start 'max'"),
        ({"fold": True}, "fold True"),
        ({"step_lr": 0}, "step_lr"),
        ({"freeze_norms": -1}, "freeze_norms"),
        ({"layers": "fc"}, "layers is a list of strings"),
        ({"dense": ("last",)}, "dense 'last'"),
    ],
)
def test_options_out_of_range_are_refused_at_once(options: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        fw.QAT(**options)


def test_bits_by_glob_and_a_glob_that_names_nothing() -> None:
    model = MODELS["mlp"][0]()
    lines = fw.QAT(bits={"*": 4, "head": 8, "mid": 2}).select(model)
    assert [line.reason for line in lines] == ["4 bits", "2 bits", "8 bits"]
    with pytest.raises(NothingToCompress, match="'fx'"):
        fw.QAT(bits={"fx": 4}).select(model)
    assert [line.action for line in fw.QAT(bits={"fc": 4}).select(model)] == ["quantized", "kept", "kept"]
