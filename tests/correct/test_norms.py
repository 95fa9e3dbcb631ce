# SPDX-License-Identifier: Apache-2.0
"""Moments of norms' outputs: exact repair of what scaling did, and the reference's mean and deviation elsewhere."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from featherweight.correct import match_moments, output_error
from featherweight.errors import OptionError
from tests.correct.surroundings import Stopped, bits, call, hooks, pruned, same, stopping


class PlusOne(nn.Module):
    """An RMS norm that stores its weight less one, as some language models do."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class PlusOneNorm(PlusOne):
    pass


class LayerNorm2d(nn.LayerNorm):
    """Channels second, as convolutional networks have them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LayerNorm": (lambda: nn.LayerNorm(6), (4, 6)),
    "LayerNorm over two axes": (lambda: nn.LayerNorm((4, 6)), (4, 6)),
    "RMSNorm": (lambda: nn.RMSNorm(6), (4, 6)),
    "LayerNorm without bias": (lambda: nn.LayerNorm(6, bias=False), (4, 6)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 6), (6, 4, 4)),
    "InstanceNorm": (lambda: nn.InstanceNorm2d(6, affine=True), (6, 4, 4)),
    "BatchNorm": (lambda: nn.BatchNorm2d(6), (6, 4, 4)),
    "a library's, weight less one": (lambda: PlusOneNorm(6), (4, 6)),
    "a library's, channels second": (lambda: LayerNorm2d(6), (6, 6, 6)),
}


def scramble(norm: nn.Module) -> None:
    """Values of its own for every parameter, and scales that are nobody's default."""
    with torch.no_grad():
        for name, parameter in norm.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + (name == "weight"))


@pytest.mark.parametrize("kind", NORMS)
def test_a_norm_whose_scales_were_changed_is_repaired_exactly(kind: str) -> None:
    torch.manual_seed(0)
    make, shape = NORMS[kind]
    reference = nn.Sequential(make(), nn.Tanh(), make()).eval()
    scramble(reference)
    model = copy.deepcopy(reference)
    with torch.no_grad():
        for norm in (model[0], model[2]):
            scale = 0.2 + torch.rand(norm.weight.shape)
            added = 1.0 if isinstance(norm, PlusOne) else 0.0
            norm.weight.copy_((norm.weight + added) * scale - added)
            if getattr(norm, "bias", None) is not None:
                norm.bias.copy_(norm.bias * scale + torch.randn(norm.bias.shape))
    batches = [torch.randn(n, *shape) for n in (8, 3)]
    moved = match_moments(model, reference, batches, call)
    assert not moved.left
    assert output_error(model, reference, batches, call) < 1e-10
    for own, dense in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(own, dense, rtol=1e-4, atol=1e-5)


def test_outputs_get_the_references_mean_and_deviation_by_channel() -> None:
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8))
    model = pruned(reference, 0.7)
    x = [torch.randn(40, 5, 6), torch.randn(8, 5, 6)]
    match_moments(model, reference, x, call)
    with torch.no_grad():
        own, dense = (torch.cat([one(batch).flatten(0, 1) for batch in x]).double() for one in (model, reference))
    assert torch.allclose(own.mean(0), dense.mean(0), atol=1e-5)
    assert torch.allclose(own.std(0), dense.std(0), rtol=1e-4)
    assert not torch.allclose(own, dense, atol=1e-2)


def test_a_later_norm_is_not_corrected_for_an_earlier_ones_shift() -> None:
    """One norm's bias was moved; the other was not touched, and must come out as it was."""
    torch.manual_seed(0)
    reference = nn.Sequential(nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 6), nn.LayerNorm(6))
    model = copy.deepcopy(reference)
    model[0].bias.data += torch.randn(6)
    match_moments(model, reference, [torch.randn(30, 6), torch.randn(9, 6)], call)
    assert torch.allclose(model[3].weight, reference[3].weight, atol=1e-5)
    assert torch.allclose(model[3].bias, reference[3].bias, atol=1e-5)


def test_padding_is_left_out_of_the_moments() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.norm(self.mix(x))

    torch.manual_seed(0)
    reference = Encoder()
    model = pruned(reference)
    mask = torch.rand(16, 7) < 0.6
    x = torch.randn(16, 7, 4)
    noisy = torch.where(mask[..., None], x, 1e3 * torch.randn(16, 7, 4))
    match_moments(model, reference, [{"x": noisy, "attention_mask": mask.long()}], call)
    with torch.no_grad():
        own, dense = model(x, mask)[mask].double(), reference(x, mask)[mask].double()
    assert torch.allclose(own.mean(0), dense.mean(0), atol=1e-5)
    assert torch.allclose(own.std(0), dense.std(0), rtol=1e-4)


class Strange(nn.Module):
    """Named a norm, yet its weight does not scale what it answers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tanh(2 + self.weight)


class StrangeNorm(Strange):
    pass


def test_what_is_left_alone_is_named_with_its_reason() -> None:
    shared = nn.LayerNorm(4)
    parts = {
        "plain": nn.LayerNorm(4, elementwise_affine=False),
        "strange": StrangeNorm(),
        "a": shared,
        "b": nn.LayerNorm(4),
        "frozen": nn.LayerNorm(4),
        "idle": nn.LayerNorm(4),
        "good": nn.LayerNorm(4),
    }
    reference = nn.ModuleDict(parts)
    reference["b"].weight = shared.weight
    model = copy.deepcopy(reference)
    before = bits(model)

    def forward(model: nn.ModuleDict, x: Tensor) -> Tensor:
        for name in ("plain", "strange", "a", "b", "frozen", "good"):
            x = model[name](x) + 0.1 * x
        return x

    moved = match_moments(model, reference, [torch.randn(30, 4)], forward, frozen=["frozen.bias"])
    assert set(moved.names) == {"good.weight", "good.bias"}
    assert set(moved.left) == {"plain", "strange", "a", "b", "frozen", "idle"}
    after = bits(model)
    assert same(
        {n: v for n, v in before.items() if "good" not in n}, {n: v for n, v in after.items() if "good" not in n}
    )
    with pytest.raises(OptionError, match=r"frozen\.bias"):
        match_moments(model, reference, [torch.randn(30, 4)], forward, frozen=["frozen.biass"])


def test_a_channel_that_does_not_vary_gets_its_mean_and_keeps_its_scale() -> None:
    """A batch norm's channel whose filter is all zeros; the deviation to reach cannot be had by scaling."""
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model = copy.deepcopy(reference)
    model[0].weight.data[1] = 0.0
    x = torch.randn(8, 3, 5, 5)
    match_moments(model, reference, [x], call)
    assert model[1].weight[1] == reference[1].weight[1]
    model.eval(), reference.eval()
    assert torch.allclose(model(x).mean((0, 2, 3)), reference(x).mean((0, 2, 3)), atol=1e-5)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_a_channel_that_pruning_took_stays_gone() -> None:
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5))
    scramble(reference[1])
    model = pruned(reference)
    with torch.no_grad():
        model[1].weight[2] = model[1].bias[2] = 0.0
    match_moments(model, reference, [torch.randn(40, 5)], call)
    assert model[1].weight[2] == 0 and model[1].bias[2] == 0
    assert (model[1].bias != 0).sum() == 4


@pytest.mark.parametrize("after", range(4))
@pytest.mark.parametrize("error", [RuntimeError(), Stopped()])
def test_a_failure_at_any_batch_leaves_both_models(after: int, error: BaseException) -> None:
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5))
    model = pruned(reference)
    own, dense = bits(model), bits(reference)
    with pytest.raises((RuntimeError, Stopped)):
        match_moments(model, reference, [torch.randn(4, 5)] * 2, stopping(after, error))
    assert same(own, bits(model)) and same(dense, bits(reference)) and hooks(model) + hooks(reference) == 0
