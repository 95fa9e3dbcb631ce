# SPDX-License-Identifier: Apache-2.0
"""Channels cut while training: what is masked stays masked, the target is met, the cut model answers as the masked one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import featherweight as fw
from featherweight.errors import NothingToCompress, NumericalError, OptionError
from featherweight.graph import trace
from featherweight.measure import count
from featherweight.prune.channels import ChannelPruner, latency
from tests.prune.channels.models import Attention, Cnn, Gated, Mlp, batch_of, built, loss_of


def net(width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
    ]
    return nn.Sequential(
        *layers, nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)
    )


INPUTS = (torch.zeros(2, 3, 6, 6),)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, 6, 6, generator=generator), torch.randn(8, 3, generator=generator)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, pruner: ChannelPruner, steps: range | int
) -> list[dict[str, Any]]:
    facts = []
    for step in range(steps) if isinstance(steps, int) else steps:
        optimizer.zero_grad()
        loss_of(model(batch(step)[0]), batch(step)).backward()
        optimizer.step()
        facts.append(pruner.step())
    return facts


@pytest.mark.parametrize("importance", ["cpd", "taylor", "fisher", "magnitude", "batch_norm", "activation", "random"])
def test_the_target_is_met_and_the_cut_model_answers_as_the_masked_one(importance: str) -> None:
    model = net(40)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    hook = fw.GradualChannelPruning({"macs": "50 %"}, importance=importance, begin=2, end=10, every=4)
    pruner = hook.attach(model, optimizer, INPUTS)
    facts = train(model, optimizer, pruner, 14)
    assert [step for step, fact in enumerate(facts) if fact["updated"]] == [2, 6, 10]
    assert facts[2]["channels"] == 1.0 > facts[6]["channels"] > facts[10]["channels"] == facts[13]["channels"]
    model.eval()
    x = batch(99)[0]
    masked = model(x)
    before = copy.deepcopy(model)
    plan = pruner.finalize()
    torch.testing.assert_close(model(x), masked, atol=1e-5, rtol=1e-5)
    now = count(model, INPUTS).macs / count(before, INPUTS).macs
    assert 0.485 <= now <= 0.51
    for parameter in model.parameters():
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    assert {edit.kind for edit in plan.edits} == {"slice"}
    fresh = net(40)
    for edit in plan.edits:
        fw.apply(fresh, edit)
    assert [p.shape for p in fresh.parameters()] == [p.shape for p in model.parameters()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_training_goes_on_with_the_same_optimizer() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    pruner = fw.GradualChannelPruning({"parameters": "40 %"}, end=4, every=2).attach(model, optimizer, INPUTS)
    train(model, optimizer, pruner, 6)
    pruner.finalize()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.zero_grad()
    loss_of(model(batch(0)[0]), batch(0)).backward()
    optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_what_is_masked_is_zero_without_gradient_or_momentum_and_never_comes_back() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    pruner = fw.GradualChannelPruning({"macs": "40 %"}, end=9, every=3).attach(model, optimizer, INPUTS)
    gone: set[int] = set()
    for step in range(12):
        optimizer.zero_grad()
        loss_of(model(batch(step)[0]), batch(step)).backward()
        rows = [i for i in range(16) if not model[0].weight.grad[i].any()]
        assert set(rows) == gone, "the masked channels have no gradient, and they alone"
        optimizer.step()
        pruner.step()
        zero = {i for i in range(16) if not model[0].weight[i].any()}
        assert gone <= zero
        gone = zero
        for i in gone:  # rows, bias, norm, and the columns that read them
            assert not model[0].bias[i]
            assert not model[1].weight[i]
            assert not model[1].bias[i]
            assert not model[3].weight[:, i].any()
            assert not optimizer.state[model[0].weight]["momentum_buffer"][i].any()
    assert len(gone) == 16 - pruner.kept["0"] > 2
    pruner.finalize()


def test_the_choice_is_the_lowest_squared_gate_gradient_per_memory_freed() -> None:
    """One update, two groups, by hand: the gates' gradients by autograd, memory by counting."""
    model = built(Mlp)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    data = [batch_of(Mlp, seed=seed) for seed in range(3)]
    hook = fw.GradualChannelPruning({"memory": 10 * 2 + 2}, schedule="one_shot", begin=2, per="memory")
    pruner = hook.attach(model, optimizer, (data[0][0][:2],))
    squares = {"a": torch.zeros(6).double(), "b": torch.zeros(5).double()}
    for one in data:
        gates = {name: torch.ones_like(total, requires_grad=True) for name, total in squares.items()}
        model.gates = gates
        loss = loss_of(model(one[0]), one)
        for name, gradient in zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True):
            squares[name] += gradient.square()
        model.gates = {}
        optimizer.zero_grad()
        loss_of(model(one[0]), one).backward()
        optimizer.step()
        pruner.step()
    # a and b each free 2 (the batch) a channel; 28 elements are to come down to 22: the three lowest of all go.
    order = sorted((float(total), name, i) for name, own in squares.items() for i, total in enumerate(own))
    expected = {(name, i) for _, name, i in order[:3]}
    zero = {("a", i) for i in range(6) if not model.a.weight[i].any()} | {
        ("b", i) for i in range(5) if not model.b.weight[i].any()
    }
    assert zero == expected
    pruner.finalize()


@pytest.mark.parametrize("importance", ["cpd", "fisher", "activation"])
def test_a_resumed_run_is_the_same_to_the_last_bit(importance: str) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer, ChannelPruner]:
        model = net()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        hook = fw.GradualChannelPruning({"macs": "40 %"}, importance=importance, end=8, every=4)
        return model, optimizer, hook.attach(model, optimizer, INPUTS)

    whole = start()
    train(*whole, 11)
    first = start()
    train(*first, 6)
    saved = [copy.deepcopy(part.state_dict()) for part in first]
    again = start()
    for part, state in zip(again, saved, strict=True):
        part.load_state_dict(state)
    train(*again, range(6, 11))
    for pruner in (whole[2], again[2]):
        pruner.finalize()
    for ours, theirs in zip(again[0].state_dict().values(), whole[0].state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_state_of_other_groups_is_refused() -> None:
    model, other = net(), net(12)
    pruner, wrong = (
        fw.GradualChannelPruning({"macs": "50 %"}, importance="magnitude").attach(m, None, INPUTS)
        for m in (model, other)
    )
    with pytest.raises(OptionError, match="other groups"):
        pruner.load_state_dict(wrong.state_dict())


def test_in_the_training_loop_with_its_report() -> None:
    model = net()
    events: list[dict[str, Any]] = []
    task = fw.Task(model, INPUTS, train=[batch(i) for i in range(4)], loss=loss_of)
    hook = fw.GradualChannelPruning({"macs": "50 %"}, end=6, every=2, keep=["3"])
    working = copy.deepcopy(model)
    plan = fw.Train(steps=9, lr=1e-3, hooks=[hook])(working, task, fw.Stage(report=events.append))
    assert plan.edits
    lines = {event["weight"]["name"]: event["weight"] for event in events if event["kind"] == "selection"}
    assert lines["0.weight"]["action"] == "pruned"
    assert lines["0.weight"]["reason"] == f"{working[0].out_channels} of 16 channels kept"
    assert lines["3.weight"]["reason"] == "keep='3' names 3.weight"
    assert "it is an output of the model" in lines["8.weight axis 0"]["reason"]
    assert any("couplings cut" in event["text"] for event in events if event["kind"] == "message")
    assert not [event for event in events if event["kind"] == "unmet"]
    assert [p.shape for p in task.model.parameters()] == [p.shape for p in model.parameters()]


def test_heads_are_cut_out_of_torchs_own_attention() -> None:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Linear(16, 16), block, nn.Linear(16, 3)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, y = torch.randn(4, 5, 16), torch.randn(4, 5, 3)
    hook = fw.GradualChannelPruning({"parameters": "70 %"}, end=4, every=2, exact=True)
    pruner = hook.attach(model, optimizer, (x,))
    for _ in range(6):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        pruner.step()
    kept = pruner.kept
    heads = next(group for group in pruner.trace.groups if group.kind == "heads")
    assert 1 <= kept[heads.name] < 4
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    masked = model(x)
    torch.backends.mha.set_fastpath_enabled(True)
    pruner.finalize()
    torch.testing.assert_close(model(x), masked, atol=1e-5, rtol=1e-5)
    stream = next(group for group in pruner.trace.groups if group.statistics)
    assert "exact=True" in pruner.reasons[stream.name]
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    optimizer.step()


def test_curvature_takes_backward_passes_of_its_own() -> None:
    model = built(Mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    one = batch_of(Mlp)
    hook = fw.GradualChannelPruning(
        {"macs": "60 %"}, importance="curvature", end=2, every=1, closure=lambda model: loss_of(model(one[0]), one)
    )
    pruner = hook.attach(model, optimizer, (one[0][:2],))
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(model(one[0]), one).backward()
        optimizer.step()
        pruner.step()
    pruner.finalize()
    assert model.a.out_features + model.b.out_features < 11


def test_latency_is_measured_on_copies_that_are_really_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is replaced by one that shows MACs, so that the answer is known; every model it sees is a real one."""
    sizes: list[int] = []

    class Shown:
        def __init__(self, median_ms: float) -> None:
            self.median_ms = median_ms

    def clock(models: dict[str, nn.Module], inputs: Any, runs: int = 50) -> dict[str, Shown]:
        macs = {name: count(model, inputs).macs for name, model in models.items()}
        sizes.extend(macs.values())
        return {name: Shown(float(n)) for name, n in macs.items()}

    for module in (latency, __import__("featherweight.prune.channels.decide", fromlist=["x"])):
        monkeypatch.setattr(module, "timed", clock)
    model = net(40)
    task = fw.Task(model, INPUTS)
    events: list[dict[str, Any]] = []
    dense = count(model, INPUTS).macs
    fw.PruneChannels({"latency": "40 %"}, importance="magnitude")(model, task, fw.Stage(report=events.append))
    assert count(model, INPUTS).macs == pytest.approx(0.4 * dense, rel=0.05)
    assert len(set(sizes)) > 4
    assert not [event for event in events if event["kind"] == "unmet"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"until": {"macs": "50 %"}, "end": 5, "begin": 6}, "end=5 is before begin=6"),
        ({"until": {"macs": "50 %"}, "importance": "cpdd"}, "importance 'cpdd' is none of .* Nearest: cpd"),
        ({"until": {"macs": "50 %"}, "importance": "structured_obs"}, "PruneChannels has it"),
        ({"until": {"macs": "50 %"}, "ranking": "both"}, "ranking 'both' is none of"),
        ({"until": {"macs": "50 %"}, "per": "watt"}, "per 'watt' is none of"),
        ({"until": {"macs": "50 %"}, "per": "macs", "ranking": "local"}, "compares no costs, and per='macs' would do"),
        ({"until": {"macs": "50 %"}, "least": -1}, "least is a count"),
        ({"until": {"macs": "50 %"}, "least": 2.5}, "neither a whole number nor a share"),
        ({"until": {"macs": "50 %"}, "multiple": 0}, "multiple must be a whole number from 1"),
        ({"until": {"macs": "50 %"}, "keep": "fc"}, "keep is a list of strings"),
        ({"until": {"macs": "50 %"}, "schedule": "sine"}, "schedule 'sine' is none of"),
        ({"until": {"macs": "50 %"}, "closure": 3}, "closure is a function"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        fw.GradualChannelPruning(**options)


def test_what_cannot_be_attached_is_refused_and_leaves_no_hook() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    until = {"macs": "50 %"}
    with pytest.raises(OptionError, match=r"example_inputs=\(x,\)"):
        fw.GradualChannelPruning(until).attach(model, optimizer)
    with pytest.raises(OptionError, match=r"attach\(model, optimizer\)"):
        fw.GradualChannelPruning(until).attach(model, None, INPUTS)
    with pytest.raises(OptionError, match="needs backward passes of its own"):
        fw.GradualChannelPruning(until, importance="curvature").attach(model, optimizer, INPUTS)
    with pytest.raises(NothingToCompress, match="keep: 'no_such'"):
        fw.GradualChannelPruning(until, keep=["no_such"]).attach(model, optimizer, INPUTS)
    with pytest.raises(NothingToCompress, match=r"Nothing to cut\. 0: no glob of layers names it"):
        fw.GradualChannelPruning(until, layers=["8"]).attach(model, optimizer, INPUTS)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    assert not optimizer._optimizer_step_pre_hooks


def test_a_frozen_layer_keeps_what_it_reads_whole() -> None:
    model = net()
    model[3].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    pruner = fw.GradualChannelPruning({"macs": "80 %"}).attach(model, optimizer, INPUTS)
    assert pruner.reasons == {"0": "3.weight is not trained, and importance='cpd' needs its gradient"}


def test_after_finalize_there_is_nothing_to_step() -> None:
    model = net()
    pruner = fw.GradualChannelPruning({"macs": "50 %"}, importance="magnitude").attach(model, None, INPUTS)
    assert pruner.finalize() == pruner.finalize() == fw.Plan()
    with pytest.raises(OptionError, match="has been finalized"):
        pruner.step()


def test_scores_that_are_not_finite_are_refused_and_masks_stand() -> None:
    model = net()
    pruner = fw.GradualChannelPruning({"macs": "50 %"}, importance="magnitude", begin=0, end=4, every=2).attach(
        model, None, INPUTS
    )
    pruner.step()
    kept = pruner.kept
    with torch.no_grad():
        model[3].weight[0, 0] = torch.nan
    pruner.step()
    with pytest.raises(NumericalError, match="not finite"):
        pruner.step()
    assert pruner.kept == kept


@pytest.mark.parametrize("kind", [Cnn, Attention])
def test_every_group_can_be_masked_and_cut(kind: type[Gated]) -> None:
    model = built(kind)
    inputs = (batch_of(kind)[0][:2],)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    hook = fw.GradualChannelPruning({"parameters": "40 %"}, end=3, every=1, ranking="local")
    pruner = hook.attach(model, optimizer, inputs)
    model.train()
    one = batch_of(kind, 16)
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(model(one[0]), one).backward()
        optimizer.step()
        pruner.step()
    pruner.finalize()
    assert trace(model, inputs).parameters() <= 0.42 * pruner.trace.parameters()
    assert all(pruner.kept[name] < size for name, size in pruner.trace.sizes.items())


def test_scores_are_summed_since_the_last_update_alone() -> None:
    model = built(Mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = fw.GradualChannelPruning({"macs": "99 %"}, begin=1, end=4, every=2).attach(
        model, optimizer, (batch_of(Mlp)[0][:2],)
    )
    singles = []
    for step in range(4):
        one = batch_of(Mlp, seed=step)
        optimizer.zero_grad()
        loss_of(model(one[0]), one).backward()
        weight = model.b.weight
        singles.append((weight * weight.grad).sum(0).square().detach())
        optimizer.step()
        pruner.step()
        gathered = pruner.state_dict()["gathered"]
        expected = {0: singles[:1], 1: [], 2: singles[2:3], 3: []}[step]
        assert (step in (1, 3)) == (not gathered)
        if expected:
            torch.testing.assert_close(gathered["a"], expected[0])
    pruner.finalize()
