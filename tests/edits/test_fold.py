# SPDX-License-Identifier: Apache-2.0
"""Oracle: the model before, in float64 and evaluation mode; BatchNorm as torch computes it."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featherweight.edits import apply, foldable
from featherweight.errors import EditError
from featherweight.layers import to_matrix, weights
from featherweight.plan import Fold
from tests.edits.snapshot import snapshot


def settle(model: nn.Module) -> nn.Module:
    """Statistics and gains as training leaves them: none at its default, some gains negative."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 3.0)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.double().eval()


LAYERS: dict[str, tuple[Callable[[bool], nn.Module], nn.Module, tuple[int, ...]]] = {
    "conv1d": (lambda bias: nn.Conv1d(4, 6, 3, bias=bias), nn.BatchNorm1d(6), (2, 4, 9)),
    "conv2d": (lambda bias: nn.Conv2d(4, 6, 3, padding=1, bias=bias), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "conv3d": (lambda bias: nn.Conv3d(2, 6, 2, bias=bias), nn.BatchNorm3d(6), (2, 2, 4, 4, 4)),
    "grouped": (lambda bias: nn.Conv2d(4, 6, 3, groups=2, bias=bias), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "depthwise": (lambda bias: nn.Conv2d(6, 6, 3, groups=6, bias=bias), nn.BatchNorm2d(6), (2, 6, 5, 5)),
    "transposed": (lambda bias: nn.ConvTranspose2d(4, 6, 3, stride=2, bias=bias), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "grouped transposed": (
        lambda bias: nn.ConvTranspose1d(4, 6, 3, groups=2, bias=bias),
        nn.BatchNorm1d(6),
        (2, 4, 5),
    ),
    "linear": (lambda bias: nn.Linear(4, 6, bias=bias), nn.BatchNorm1d(6), (5, 4)),
    "without affine": (lambda bias: nn.Conv2d(4, 6, 1, bias=bias), nn.BatchNorm2d(6, affine=False), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_answer_stays_in_float64(kind: str, bias: bool) -> None:
    make, norm, shape = LAYERS[kind]
    model = settle(nn.Sequential(make(bias), copy.deepcopy(norm), nn.ReLU()))
    x = torch.randn(shape, dtype=torch.float64)
    expected = model(x)
    folds, left = foldable(model, lambda: model(x))
    assert folds == (Fold("0", "1"),) and not left
    apply(model, folds[0])
    assert type(model[1]) is nn.Identity
    assert float((model(x) - expected).abs().max()) < 1e-12
    assert set(model.state_dict()) == {"0.weight", "0.bias"}


def test_zeros_stay_plain_zeros_and_the_weight_keeps_its_identity() -> None:
    model = settle(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model[0].weight.data.view(-1)[::3] = 0.0
    weight, bias, zero = model[0].weight, model[0].bias, model[0].weight == 0
    assert bool((model[1].weight < 0).any())
    apply(model, Fold("0", "1"))
    assert model[0].weight is weight and model[0].bias is bias
    assert torch.equal(weight == 0, zero)
    assert not bool(torch.signbit(weight[zero]).any())


class Branches(nn.Module):
    """Norms of which only `after_first` may be folded; each other for a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("first", "read_twice", "shared", "answered", "between", "plain"):
            self.add_module(name, nn.Conv2d(3, 3, 1))
        self.wide = nn.Linear(4, 3)
        for name in ("first", "read_twice", "shared", "answered", "between", "wide"):
            self.add_module(f"after_{name}", nn.BatchNorm1d(3) if name == "wide" else nn.BatchNorm2d(3))
        self.of_input, self.unused = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.batchwise = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.after_first(self.first(self.of_input(x)))
        y = self.read_twice(x)
        x = self.after_read_twice(y) + y
        x = self.after_shared(self.shared(x)) + self.after_shared(x)
        y = self.answered(x)
        x = self.after_answered(y)
        x = self.after_between(torch.relu(self.between(x)))
        x = self.batchwise(self.plain(x))
        return x, y, self.after_wide(self.wide(x[:, :, 0, :4]))


def test_only_a_norm_that_alone_reads_a_layer_is_folded() -> None:
    model = settle(Branches())
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    before = snapshot(model)
    folds, left = foldable(model, lambda: model(x))
    assert snapshot(model) == before
    assert folds == (Fold("first", "after_first"),)
    assert left == {
        "of_input": "it reads what is not the output of one layer with weights",
        "after_read_twice": "not into read_twice: the model reads that layer's output too (add)",
        "after_shared": "it reads what is not the output of one layer with weights",
        "after_answered": "not into answered: the model answers with that layer's output too",
        "after_between": "it reads what is not the output of one layer with weights",
        "batchwise": "not into plain: it keeps no running statistics, so that it depends on the batch",
        "after_wide": "not into wide: the norm's channels are on another axis than that layer's",
        "unused": "it was never called",
    }
    expected = model(x)
    apply(model, folds[0])
    assert all(float((a - b).abs().max()) < 1e-12 for a, b in zip(model(x), expected, strict=True))


class Twice(nn.Module):
    """One pair that is called twice; with `loose`, the second call of the layer has no norm after it."""

    def __init__(self, loose: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.loose = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), loose

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return torch.relu(self.conv(x)) if self.loose else self.norm(self.conv(x))


def test_a_pair_that_is_called_twice_is_folded_where_both_always_come_together() -> None:
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    model = settle(Twice(loose=False))
    expected = model(x)
    apply(model, foldable(model, lambda: model(x))[0][0])
    assert float((model(x) - expected).abs().max()) < 1e-12
    loose = settle(Twice(loose=True))
    folds, left = foldable(loose, lambda: loose(x))
    assert not folds and "reads that layer's output too (relu)" in left["norm"]


def tied() -> nn.Module:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "norm": nn.BatchNorm1d(3)})
    model["b"].weight = model["a"].weight
    return model


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[0].register_forward_hook(lambda *_: None)
    return model


norm = nn.BatchNorm1d(3)


@pytest.mark.parametrize(
    ("model", "edit", "message"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), Fold("0", "2"), "no layer '2'"),
        (nn.Sequential(nn.Linear(3, 4), nn.ReLU()), Fold("0", "1"), "it is a ReLU, not a BatchNorm"),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4)), Fold("0", "1"), "that is a ReLU"),
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(5)), Fold("0", "1"), "that has 4 outputs, the norm 5"),
        (nn.Sequential(nn.Linear(3, 3), norm, nn.Linear(3, 3), norm), Fold("0", "1"), "stands in the model more"),
        (tied(), Fold("a", "norm"), "shares its weight or bias"),
        (hooked(), Fold("0", "1"), "that has hooks"),
        (
            nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.BatchNorm1d(4)),
            Fold("0", "1"),
            "with a plain weight",
        ),
    ],
)
def test_what_does_not_fit_changes_nothing(model: nn.Module, edit: Fold, message: str) -> None:
    before = snapshot(model)
    with pytest.raises(EditError, match=re.escape(message)):
        apply(model, edit)
    assert snapshot(model) == before


def test_an_unbatched_input_is_left_alone() -> None:
    """A BatchNorm1d takes (channels, length) for (batch, channels): it does not norm the conv's channels."""
    model = settle(nn.Sequential(nn.Conv1d(2, 5, 1), nn.BatchNorm1d(5)))
    x = torch.randn(2, 5, dtype=torch.float64)
    folds, left = foldable(model, lambda: model(x))
    assert not folds and "on another axis" in left["1"]


def test_a_fold_scales_rows_of_the_weight_as_a_matrix() -> None:
    """The rows that grids and solvers see are the ones that a norm scales, for grouped transposed convs too."""
    model: Any = settle(nn.Sequential(nn.ConvTranspose1d(4, 6, 3, groups=2), nn.BatchNorm1d(6)))
    [weight], _ = weights(model)
    before = to_matrix(weight, weight.parameter).clone()
    apply(model, Fold("0", "1"))
    ratio = to_matrix(weight, weight.parameter) / before
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio))
