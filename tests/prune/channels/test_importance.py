# SPDX-License-Identifier: Apache-2.0
"""Each importance against a direct computation: autograd through gates that stand in the forward, loops, least squares."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featherweight.errors import NumericalError, OptionError
from featherweight.graph import Group, Trace, trace
from featherweight.prune.channels import PruneChannels
from featherweight.prune.channels import gather as gathering
from featherweight.prune.channels.curvature import curvature, hessian_product
from featherweight.prune.channels.gates import PerSample, gate_gradient
from featherweight.prune.channels.gather import Data, batch_norm_scales, scores_of
from featherweight.prune.channels.importance import normalized
from featherweight.task import default_forward
from tests.prune.channels.models import Attention, Cnn, Gated, Mlp, batch_of, built, loss_of

# Groups of each model, each with the name of its gate.
GATES = [(Mlp, "a", "a"), (Mlp, "b", "b"), (Cnn, "stem", "stem"), (Cnn, "a", "a"), (Attention, "q", "heads")]
by_group = pytest.mark.parametrize(("kind", "name", "gate"), GATES)


def traced(kind: type[Gated]) -> tuple[Gated, Trace]:
    model = built(kind)
    return model, trace(model, (batch_of(kind)[0][:2],))


def gate_by_autograd(model: Gated, group: Group, gate: str, batch: Any) -> Tensor:
    """dL/dm of a gate in the forward."""
    m = torch.ones(group.size, dtype=torch.float64, requires_grad=True)
    model.gates = {gate: m}
    found = torch.autograd.grad(loss_of(model(batch[0]), batch), m)[0]
    model.gates = {}
    return found


def gates_by_loop(model: Gated, group: Group, gate: str, batch: Any) -> Tensor:
    """dL_n/dm, one sample after the other."""
    x, y = batch
    return torch.stack([gate_by_autograd(model, group, gate, (x[i : i + 1], y[i : i + 1])) for i in range(len(x))])


def scored(
    model: nn.Module, groups: list[Group], importance: Any, batches: list[Any], **options: Any
) -> dict[str, Tensor]:
    chosen = PruneChannels({"macs": "50 %"}, importance=importance, **options)
    gone = {group.name: np.zeros(group.size, dtype=bool) for group in groups}
    found, reasons = scores_of(model, groups, gone, chosen, Data(batches, default_forward, loss_of))
    assert not reasons
    return found


@by_group
def test_weights_and_gradients_give_the_gradient_of_a_gate_in_the_forward(
    kind: type[Gated], name: str, gate: str
) -> None:
    model, found = traced(kind)
    batch = batch_of(kind)
    loss_of(model(batch[0]), batch).backward()
    tensors = dict(model.named_parameters())
    gradients = {name: parameter.grad for name, parameter in tensors.items()}
    ours = gate_gradient(found[name], tensors, gradients)
    torch.testing.assert_close(ours, gate_by_autograd(model, found[name], gate, batch))


@by_group
def test_hooks_give_the_gradient_of_each_samples_gate(kind: type[Gated], name: str, gate: str) -> None:
    model, found = traced(kind)
    batch = batch_of(kind)
    with PerSample(model, [found[name]]) as watch:
        loss_of(model(batch[0]), batch).backward()
        ours = watch.take()[name]
        assert not watch.take()
    torch.testing.assert_close(ours, gates_by_loop(model, found[name], gate, batch))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_hooks_add_up_the_samples_of_several_backward_passes() -> None:
    model, found = traced(Cnn)
    first, second = batch_of(Cnn, 3), batch_of(Cnn, 4, seed=2)
    with PerSample(model, [found["a"]]) as watch:
        for batch in (first, second):
            loss_of(model(batch[0]), batch).backward()
        ours = watch.take()["a"]
    expected = torch.cat([gates_by_loop(model, found["a"], "a", batch) for batch in (first, second)])
    torch.testing.assert_close(ours, expected)


@by_group
@pytest.mark.parametrize("by_hooks", [True, False])
def test_scores_of_gates(
    kind: type[Gated], name: str, gate: str, by_hooks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not by_hooks:
        monkeypatch.setattr(gathering, "seen_by_hooks", lambda *args: "not seen")
    model, found = traced(kind)
    group, batches = found[name], [batch_of(kind), batch_of(kind, 5, seed=2)]
    means = torch.stack([gate_by_autograd(model, group, gate, batch) for batch in batches])
    singles = torch.cat([gates_by_loop(model, group, gate, batch) for batch in batches])
    expected = {
        "taylor": means.abs().sum(0),
        "cpd": means.square().sum(0),
        "fisher": singles.square().sum(0) / 2,
        "heads": singles.abs().sum(0) / singles.abs().sum(0).norm(),
    }
    for importance, scores in expected.items():
        torch.testing.assert_close(scored(model, [group], importance, batches)[name], scores)


def test_per_sample_scores_of_what_hooks_cannot_see_come_sample_by_sample() -> None:
    """torch's MultiheadAttention calls no module of its output projection."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double().eval()
    x, y = torch.randn(5, 3, 8).double(), torch.randn(5, 3, 8).double()
    member_of = "self_attn.out_proj.weight"
    positions = np.arange(8).reshape(2, 4)
    from featherweight.graph import Member

    group = Group("self_attn", 2, (Member(member_of, 1, "input", positions),), "heads")
    ours = scored(model, [group], "fisher", [(x, y)])["self_attn"]
    torch.backends.mha.set_fastpath_enabled(False)
    expected = torch.zeros(2).double()
    weight = model.self_attn.out_proj.weight
    for i in range(len(x)):
        (gradient,) = torch.autograd.grad((model(x[i : i + 1]) - y[i : i + 1]).square().mean(), weight)
        torch.backends.mha.set_fastpath_enabled(False)
        expected += (weight * gradient).sum(0).view(2, 4).sum(1).square().detach() / 2
    torch.backends.mha.set_fastpath_enabled(True)
    torch.testing.assert_close(ours, expected)


def test_gates_at_the_layers_that_make_a_channel_see_nothing_through_a_batch_norm_in_training() -> None:
    """Why gates stand at the layers that read: a factor on a filter is undone by the BatchNorm behind it."""
    model, found = traced(Cnn)
    model.norm_a.eps = 1e-12
    model.train()
    batch = batch_of(Cnn, 16)
    loss_of(model(batch[0]), batch).backward()
    tensors = dict(model.named_parameters())
    gradients = {name: parameter.grad for name, parameter in tensors.items()}
    at_makers = gate_gradient(found["a"], tensors, gradients, "outputs")
    at_readers = gate_gradient(found["a"], tensors, gradients, "inputs")
    assert at_makers is not None
    assert at_readers is not None
    assert float(at_makers.abs().max()) < 1e-9 < 1e-5 < float(at_readers.abs().min())


def hessian_of(model: Gated, groups: dict[str, Group], batches: list[Any]) -> Tensor:
    """The exact Hessian over all gates together, by autograd twice."""
    sizes = [group.size for group in groups.values()]

    def loss(m: Tensor) -> Tensor:
        model.gates = dict(zip(groups, m.split(sizes), strict=True))
        total = torch.stack([loss_of(model(batch[0]), batch) for batch in batches]).mean()
        model.gates = {}
        return total

    return torch.autograd.functional.hessian(loss, torch.ones(sum(sizes), dtype=torch.float64))


@pytest.mark.parametrize(("kind", "gates"), [(Mlp, {"a": "a", "b": "b"}), (Attention, {"heads": "q"})])
def test_products_with_the_gates_hessian(kind: type[Gated], gates: dict[str, str]) -> None:
    model, found = traced(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = batch_of(kind)
    groups = {gate: found[name] for gate, name in gates.items()}
    H = hessian_of(model, groups, [batch])
    parameters = dict(model.named_parameters())

    def gradients() -> dict[str, Tensor | None]:
        loss = loss_of(model(batch[0]), batch)
        return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))

    v = torch.randn(len(H), dtype=torch.float64)
    sizes = [group.size for group in groups.values()]
    direction = {group.name: part for group, part in zip(groups.values(), v.split(sizes), strict=True)}
    product = hessian_product(parameters, list(groups.values()), gradients, direction)
    ours = torch.cat([product[group.name] for group in groups.values()])
    torch.testing.assert_close(ours, H @ v, rtol=1e-6, atol=1e-8)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_curvature_is_the_row_norms_of_the_gates_hessian() -> None:
    model, found = traced(Mlp)
    batches = [batch_of(Mlp), batch_of(Mlp, seed=2)]
    groups = {"a": found["a"], "b": found["b"]}
    expected = hessian_of(model, groups, batches).square().sum(1).split([6, 5])
    parameters = dict(model.named_parameters())

    def gradients() -> dict[str, Tensor | None]:
        loss = torch.stack([loss_of(model(batch[0]), batch) for batch in batches]).mean()
        return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))

    ours = curvature(parameters, list(groups.values()), gradients, probes=600)
    for name, rows in zip(groups, expected, strict=True):
        assert torch.allclose(ours[name].double(), rows, rtol=0.3), (ours[name], rows)
    # The method's own figure is the same estimate from fewer probes.
    few = scored(model, list(groups.values()), "curvature", batches)
    again = curvature(parameters, list(groups.values()), gradients, probes=8)
    torch.testing.assert_close(few["a"], again["a"].double(), rtol=1e-6, atol=0)


def test_magnitude_is_of_all_that_goes_with_a_channel() -> None:
    model, found = traced(Cnn)
    state = {name: tensor.detach().numpy() for name, tensor in model.named_parameters()}
    for name, loop in (("a", _cnn_a), ("deep", _cnn_deep)):
        both = scored(model, [found[name]], "magnitude", []), scored(model, [found[name]], "magnitude_l1", [])
        parts = [np.concatenate([part.ravel() for part in loop(state, i)]) for i in range(found[name].size)]
        np.testing.assert_allclose(both[0][name], [np.sqrt((part**2).sum()) for part in parts])
        np.testing.assert_allclose(both[1][name], [np.abs(part).sum() for part in parts])


def _cnn_a(state: dict[str, Any], i: int) -> list[Any]:
    return [state["a.weight"][i], state["b.weight"][:, i]]


def _cnn_deep(state: dict[str, Any], i: int) -> list[Any]:
    pair = [i, i + 4]  # one channel of each conv group of `point`, whose columns count within a group
    made = [state[f"{layer}.{leaf}"][pair] for layer in ("deep", "depth") for leaf in ("weight", "bias")]
    return [*made, state["point.weight"][:, i]]


def test_batch_norm_scale() -> None:
    model, found = traced(Cnn)
    assert batch_norm_scales(model) == {"norm.weight", "norm_a.weight"}
    assert torch.equal(scored(model, [found["a"]], "batch_norm", [])["a"], model.norm_a.weight.detach().abs())
    chosen = PruneChannels({"macs": "50 %"}, importance="batch_norm")
    gone = {"deep": np.zeros(4, dtype=bool)}
    scores, reasons = scores_of(model, [found["deep"]], gone, chosen, None)
    assert not scores
    assert "no BatchNorm" in reasons["deep"]


def test_geometric_median_sums_distances_between_rows() -> None:
    model, found = traced(Mlp)
    rows = np.concatenate([model.a.weight.detach().numpy(), model.a.bias.detach().numpy()[:, None]], axis=1)
    expected = [sum(np.linalg.norm(row - other) for other in rows) for row in rows]
    np.testing.assert_allclose(scored(model, [found["a"]], "geometric_median", [])["a"], expected)


def test_activation_is_the_norm_of_what_is_read_times_the_weights_that_read_it() -> None:
    model, found = traced(Cnn)
    batches = [batch_of(Cnn), batch_of(Cnn, 3, seed=2)]
    ours = scored(model, [found["stem"], found["deep"]], "activation", batches)
    seen: dict[str, list[Tensor]] = {"a": [], "deep": [], "point": []}
    for name, calls in seen.items():
        getattr(model, name).register_forward_pre_hook(lambda m, args, calls=calls: calls.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(batch[0])
    x = {name: torch.cat(calls) for name, calls in seen.items()}

    def norm(name: str, channel: int) -> Tensor:
        return x[name][:, channel].norm()

    stem = [
        norm("a", i) * model.a.weight[:, i].abs().sum() + norm("deep", i) * model.deep.weight[:, i].abs().sum()
        for i in range(8)
    ]
    # Rows 0 and 1 of `point` read channels 0 to 3, rows 2 and 3 channels 4 to 7.
    deep = [
        norm("point", i) * model.point.weight[:2, i].abs().sum()
        + norm("point", i + 4) * model.point.weight[2:, i].abs().sum()
        for i in range(4)
    ]
    torch.testing.assert_close(ours["stem"], torch.stack(stem).detach())
    torch.testing.assert_close(ours["deep"], torch.stack(deep).detach())


def least_squares(X: Tensor, Y: Tensor, columns: list[int]) -> float:
    """||Y - V X||² / tokens with the best V on these columns of X (tokens, d)."""
    if not columns:
        return float(Y.square().sum()) / len(X)
    V = torch.linalg.lstsq(X[:, columns], Y, driver="gelsd").solution
    return float((Y - X[:, columns] @ V).square().sum()) / len(X)


def test_structured_obs_is_what_least_squares_leaves() -> None:
    """In order: each coupling costs what the best refit without it loses beyond the best refit before."""
    model, found = traced(Mlp)
    batch = batch_of(Mlp, 64)
    ours = scored(model, [found["a"], found["b"]], "structured_obs", [batch])
    with torch.no_grad():
        a = torch.tanh(model.a(batch[0]))
        b = torch.tanh(model.b(a))
    for name, X, W in (("a", a, model.b.weight), ("b", b, model.head.weight)):
        Y, left, before, expected = X @ W.detach().T, list(range(X.shape[1])), 0.0, torch.zeros(X.shape[1])
        highest = 0.0
        while left:
            costs = {i: least_squares(X, Y, [j for j in left if j != i]) for i in left}
            chosen = min(costs, key=lambda i: costs[i])
            highest = max(highest, costs[chosen] - before)
            expected[chosen], before = highest, costs[chosen]
            left.remove(chosen)
        torch.testing.assert_close(ours[name], expected.double(), rtol=2e-2, atol=1e-3 * float(expected.max()))
        assert ours[name].argsort().tolist() == expected.argsort().tolist()


def test_structured_obs_sums_over_all_that_read_the_group() -> None:
    """The stage of the CNN is read by a 3x3 convolution and a 1x1 one, from different inputs."""
    model, found = traced(Cnn)
    batch = batch_of(Cnn, 40)
    seen: dict[str, Tensor] = {}
    for name in ("a", "deep"):
        getattr(model, name).register_forward_pre_hook(lambda m, args, name=name: seen.__setitem__(name, args[0]))
    with torch.no_grad():
        model(batch[0])
    patches = torch.nn.functional.unfold(seen["a"], 3, padding=1).transpose(1, 2).flatten(0, 1)
    points = seen["deep"].permute(0, 2, 3, 1).flatten(0, 2)
    Y_a, Y_deep = patches @ model.a.weight.detach().flatten(1).T, points @ model.deep.weight.detach().flatten(1).T
    costs = []
    for i in range(8):
        taps = [j for j in range(72) if j // 9 != i]
        costs.append(least_squares(patches, Y_a, taps) + least_squares(points, Y_deep, [j for j in range(8) if j != i]))
    ours = scored(model, [found["stem"]], "structured_obs", [batch])["stem"]
    first = int(np.argmin(costs))
    assert int(ours.argmin()) == first
    assert float(ours[first]) == pytest.approx(costs[first], rel=2e-2)


def test_random_is_the_same_for_the_same_seed() -> None:
    model, found = traced(Mlp)
    groups = [found["a"], found["b"]]
    first, again = (scored(model, groups, "random", [], seed=1)["a"] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, scored(model, groups, "random", [], seed=2)["a"])


def test_a_function_of_the_users() -> None:
    model, found = traced(Mlp)
    ours = scored(model, [found["a"]], lambda group, tensors: tensors["a.bias"], [])
    assert torch.equal(ours["a"], model.a.bias.detach())
    with pytest.raises(OptionError, match=r"Tensor\[2\].*for group a.*Tensor\[6\]"):
        scored(model, [found["a"]], lambda group, tensors: torch.zeros(2), [])
    with pytest.raises(NumericalError, match="group a is NaN"):
        scored(model, [found["a"]], lambda group, tensors: torch.full((6,), torch.nan), [])


@pytest.mark.parametrize(("how", "size"), [("none", 1.0), ("mean", 2.0), ("l2", 14**0.5)])
def test_scores_are_normalized_within_a_group(how: str, size: float) -> None:
    torch.testing.assert_close(
        normalized(torch.tensor([1.0, 2.0, 3.0]), how), torch.tensor([1.0, 2.0, 3.0]).double() / size
    )


def test_a_loss_that_is_not_finite_is_refused() -> None:
    model, found = traced(Mlp)
    x, y = batch_of(Mlp)
    with pytest.raises(NumericalError, match="The loss of batch 1"):
        scored(model, [found["a"]], "cpd", [(x, y), (x * torch.nan, y)])


def test_modes_and_gradients_are_left_as_they_were() -> None:
    model, found = traced(Cnn)
    model.train()
    model.norm.eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for importance in ("cpd", "fisher", "curvature", "activation", "structured_obs"):
        scored(model, [found["stem"], found["a"]], importance, [batch_of(Cnn)])
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not list(itertools.chain.from_iterable(m._forward_pre_hooks.values() for m in model.modules()))
