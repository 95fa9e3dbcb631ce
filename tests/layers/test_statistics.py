# SPDX-License-Identifier: Apache-2.0
"""Sums over calls and batches: precision, masks, ties, references that part; and that models are left as they were."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featherweight.errors import DataError, NumericalError, OptionError
from featherweight.layers import call_steps, collect, problems
from featherweight.task import default_forward
from tests.layers.oracles import (
    Shared,
    arguments,
    assert_same_loss,
    context_of,
    gather,
    gram,
    perturbed,
    unrolled,
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_products_of_float32_err_by_less_than_a_millionth() -> None:
    """Against float64 of the same inputs, which are all positive: the hardest case, nothing cancels."""
    x = torch.rand(40, 500, 300) + 0.5
    found = gather(nn.Linear(300, 2), list(x.split(16)))["weight"]
    exact = gram(x.double().flatten(0, 1))
    assert float((found.H - exact).norm() / exact.norm()) < 2e-7
    assert float(((found.H - exact).abs() / exact.abs()).max()) < 1e-6
    assert torch.equal(found.H, found.H.T)


def test_calls_of_few_tokens_add_up_though_what_was_read_is_overwritten() -> None:
    class Reusing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = x.clone()
            out = self.fc(y)
            y.zero_()
            return out

    batches = list(torch.randn(70, 7, 3, dtype=torch.float64))
    found = gather(Reusing().double(), batches)["fc.weight"]
    torch.testing.assert_close(found.H, gram(torch.cat(batches)))
    assert (found.samples, found.tokens) == (490, 490)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(dtype: torch.dtype) -> None:
    layer = nn.Linear(300, 4).to(dtype)
    reference = copy.deepcopy(layer).float()
    reference.weight.data += 0.1
    x = torch.randn(64, 300).to(dtype)
    problem = problems(layer)[0]
    found = collect(layer, problem, [x], lambda model, batch: model(batch.to(model.weight.dtype)), reference=reference)
    exact = gram(x.double())
    assert float((found["weight"].H - exact).norm() / exact.norm()) < 1e-6
    target = reference.weight.detach().double() @ exact
    assert float((found["weight"].T - target).norm() / target.norm()) < 1e-6


def test_autocast_and_reduced_products_do_not_reach_the_sums() -> None:
    layer, x = nn.Linear(64, 4), torch.randn(512, 64)
    reference = perturbed(layer)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = gather(layer, [x], reference=reference)["weight"]
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(precision)
    assert float((found.H - gram(x.double())).norm() / found.H.norm()) < 1e-6
    target = reference.weight.detach().double() @ gram(x.double())
    assert float((found.T - target).norm() / target.norm()) < 1e-6


def test_a_shared_weight_gathers_all_calls_of_all_its_modules() -> None:
    model = Shared().double()
    reference = perturbed(model)
    batches = [torch.randint(0, 5, (n, 3)) for n in (2, 4)]
    found = gather(model, batches, reference=reference)
    assert list(found) == ["words.weight", "twice.weight"]
    for name, layers in {"twice.weight": ("twice", "again"), "words.weight": ("head",)}.items():
        X, Y = [], []
        for layer in layers:
            X += [x.flatten(0, 1) for (x,) in arguments(model, model.get_submodule(layer), batches)]
            there = arguments(reference, reference.get_submodule(layer), batches)
            Y += [x.flatten(0, 1) @ reference.get_submodule(layer).weight.detach().T for (x,) in there]
        one, X, Y = found[name], torch.cat(X), torch.cat(Y)
        assert one.tokens == len(X) and one.samples == 6 and one.scale is None
        assert_same_loss(
            lambda V, X=X, Y=Y: (Y - X @ V.T).square().sum() / len(X), one, torch.randn(len(Y.T), 4).double()
        )


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.rnn = nn.GRU(4, 4, batch_first=True)
        self.mix = nn.Linear(4, 4)
        self.pool = nn.Linear(4, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.words(input_ids)
        x = x + self.attention(x, x, x, key_padding_mask=attention_mask == 0)[0]
        return self.pool(self.mix(self.rnn(x)[0])[:, 0])


def test_masked_tokens_are_left_out_where_a_layer_reads_them() -> None:
    model = Masked().double().eval()
    reference = perturbed(model)
    # As many tokens as channels: what a layer reads as (B, channels) must not be taken for (B, T).
    ids, mask = torch.randint(0, 9, (3, 4)), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": mask}
    found = gather(model, [batch], reference=reference)
    assert {one.tokens for name, one in found.items() if name != "pool.weight"} == {8}
    assert found["pool.weight"].tokens == 3
    counts = torch.bincount(ids[mask == 1], minlength=9)
    torch.testing.assert_close(found["words.weight"].scale, (counts / 8).double().sqrt(), rtol=1e-6, atol=0)
    real = mask.flatten() == 1
    for layer in ("mix", "rnn"):
        (x,) = arguments(model, model.get_submodule(layer), [batch])[0][:1]
        name = "mix.weight" if layer == "mix" else "rnn.weight_ih_l0"
        torch.testing.assert_close(found[name].H, gram(x.flatten(0, 1)[real]))
    oracle = unrolled(model.rnn, list(x), None)["weight_hh_l0"].detach()
    torch.testing.assert_close(found["rnn.weight_hh_l0"].H, gram(oracle[real]))
    x = model.words(ids).detach()
    hidden = (mask == 0)[:, None].expand(-1, 4, -1)
    context = context_of(model.attention, x, x, x, hidden).detach()
    torch.testing.assert_close(found["attention.out_proj.weight"].H, gram(context.flatten(0, 1)[real]))
    torch.testing.assert_close(found["attention.in_proj_weight[2]"].H, gram(x.flatten(0, 1)[real]))
    Y = (reference.words(ids) @ reference.attention.in_proj_weight[:4].T).flatten(0, 1)[real].detach()
    torch.testing.assert_close(found["attention.in_proj_weight[0]"].T, 2 * Y.T @ x.flatten(0, 1)[real] / 8)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.ends = 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        x = self.middle(torch.tanh(self.first(x)))
        self.ends += 1
        return self.last(x)


def test_a_forward_ends_early_and_gives_what_a_whole_one_does() -> None:
    model = Counting()
    reference = perturbed(model)
    batches = list(torch.randn(4, 3, 4))
    found, _ = problems(model)
    whole = collect(model, found, batches, default_forward, reference=reference)
    assert (model.ends, reference.ends) == (4, 4)
    early = collect(model, found[:2], batches, default_forward, reference=reference)
    assert (model.ends, reference.ends) == (5, 5)  # the first batch alone was run to its end
    for name, one in early.items():
        assert torch.equal(one.H, whole[name].H)
        assert torch.equal(one.T, whole[name].T)
        assert (one.energy, one.samples, one.tokens) == (whole[name].energy, 12, 12)


def test_a_forward_ends_after_an_attention_though_its_output_projection_is_never_called() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), Counting())
    only = [problem for problem in problems(model)[0] if "self_attn" in problem.name]
    found = gather(model, list(torch.randn(3, 2, 5, 4)), only=only)
    assert model[1].ends == 1
    assert found["0.self_attn.out_proj.weight"].tokens == 30


@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Conv1d(4, 3, 1)])
def test_a_hook_that_changes_what_a_layer_answers_does_not_change_what_its_weight_should(layer: nn.Module) -> None:
    layer = layer.double()
    reference, x = perturbed(layer), torch.randn(5, 4, 4, dtype=torch.float64)
    plain = gather(layer, [x], reference=reference)["weight"]
    layer.register_forward_hook(lambda module, args, output: output + 1)
    hooked = gather(layer, [x], reference=reference)["weight"]
    torch.testing.assert_close(hooked.T, plain.T)
    assert hooked.energy == pytest.approx(plain.energy)


class Recalled(Counting):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.tanh(super().forward(x)))


def test_a_layer_that_is_called_again_is_waited_for() -> None:
    model = Recalled().double()
    batches = list(torch.randn(3, 2, 4, dtype=torch.float64))
    found = gather(model, batches, only=problems(model)[0][:1])
    assert model.ends == 6
    X = torch.cat([x for (x,) in arguments(model, model.first, batches)])
    torch.testing.assert_close(found["first.weight"].H, gram(X))


def state_of(model: nn.Module) -> Any:
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    modes = [module.training for module in model.modules()]
    values = {name: value.clone() for name, value in model.state_dict().items()}
    return hooks, modes, torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled(), values


def assert_same_state(one: Any, other: Any) -> None:
    assert one[:-1] == other[:-1]
    assert all(torch.equal(value, other[-1][name]) for name, value in one[-1].items())


def test_both_models_are_left_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.9), Counting())
    model[1].eval()
    reference = perturbed(model)
    before = state_of(model), state_of(reference)
    x = torch.randn(6, 4)
    found = gather(model, [x, x], reference=reference)
    assert_same_state(before[0], state_of(model))
    assert_same_state(before[1], state_of(reference))
    torch.testing.assert_close(
        found["3.first.weight"].H, gram(model.eval()[:2](x).detach().double()), rtol=1e-5, atol=1e-6
    )


def test_the_newer_switches_of_precision_come_back_too() -> None:
    places = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul]
    before = [place.fp32_precision for place in places]
    try:
        for place, word in zip(places, ("tf32", "tf32", "bf16"), strict=True):
            place.fp32_precision = word
        gather(nn.Linear(3, 2), [torch.randn(2, 3)])
        assert [place.fp32_precision for place in places] == ["tf32", "tf32", "bf16"]
    finally:
        for place, word in zip(places, before, strict=True):
            place.fp32_precision = word


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e19])
def test_activations_that_are_not_finite_name_layer_and_batch(poison: float) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    batches = [torch.randn(2, 4), torch.randn(2, 4)]
    batches[1][0, 0] = poison
    before = state_of(model)
    with pytest.raises(NumericalError, match=r"^0: what weight reads holds NaN, infinity .* in batch 1 of the data"):
        gather(model, batches)
    assert_same_state(before, state_of(model))
    reference = copy.deepcopy(model)
    reference[0].bias.data[:] = poison
    with pytest.raises(NumericalError, match=r"2: .* batch 0 of the reference"):
        gather(model, batches[:1], reference=reference)
    assert_same_state(before, state_of(model))


def test_a_model_that_fails_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 2))
    before = state_of(model)
    with pytest.raises(RuntimeError, match="shapes"):
        gather(model, [torch.randn(2, 4)])
    assert_same_state(before, state_of(model))
    with pytest.raises(DataError, match="could not be called"):
        gather(model, [{"x": torch.randn(2, 4)}])
    assert_same_state(before, state_of(model))


def test_no_batch_is_an_error_and_a_generator_is_not() -> None:
    layer = nn.Linear(3, 2)
    with pytest.raises(DataError, match="no batch"):
        gather(layer, [])
    x = torch.randn(4, 3)
    found = collect(layer, problems(layer)[0], (part for part in x.split(2)), default_forward)
    assert found["weight"].samples == 4


def test_layers_that_are_never_reached_are_absent() -> None:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.empty = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.empty(x[:0])
            return self.used(x)

    model = Expert()
    assert list(gather(model, [torch.randn(4, 3)] * 2)) == ["used.weight"]
    steps = call_steps(model, problems(model)[0], default_forward, torch.randn(4, 3))
    assert [[problem.name for problem in step] for step in steps] == [["empty.weight"], ["used.weight"]]


class Routed(nn.Module):
    """A mixture of two experts; a token's first feature decides."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 3)
        self.experts = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.mix(x), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            chosen = (x[:, 0] > 0) == bool(i)
            if bool(chosen.any()):
                y[chosen] = expert(x[chosen])
        return y


def test_an_expert_that_was_sent_other_tokens_is_told_what_the_reference_would_make_of_its_own() -> None:
    model = Routed().double()
    reference = perturbed(model)
    reference.mix.bias.data[0] = 1e3  # sends all to expert 1
    x = torch.randn(20, 3, dtype=torch.float64)
    found = gather(model, [x], reference=reference)
    assert found["mix.weight"].unpaired == 0
    for i in range(2):
        name = f"experts.{i}.weight"
        one = found[name]
        assert one.unpaired == 1
        torch.testing.assert_close(one.T, reference.get_parameter(name).detach() @ one.H)


def test_a_reference_of_another_structure_is_refused() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4)), torch.randn(2, 3)
    with pytest.raises(OptionError, match=r"\(4, 3\) in the model and \(5, 3\) in the reference"):
        gather(model, [x], reference=nn.Sequential(nn.Linear(3, 5)))
    with pytest.raises(OptionError, match="no Linear '0'"):
        gather(model, [x], reference=nn.Sequential(nn.Flatten()))
    with pytest.raises(OptionError, match=r"no parameter '0\.weight'"):
        collect(nn.Linear(3, 4), problems(model)[0], [x], default_forward)


def test_a_wrapped_model_is_its_own() -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    found, _ = problems(nn.DataParallel(model))
    assert [problem.name for problem in found] == ["0.weight"]
    assert list(collect(nn.DataParallel(model), found, [torch.randn(2, 3)], default_forward)) == ["0.weight"]
