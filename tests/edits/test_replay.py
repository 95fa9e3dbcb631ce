# SPDX-License-Identifier: Apache-2.0
"""A plan written down, read back and replayed on a fresh model, then a strict load: the same answers to the last bit.

The live model is edited, its new values are trained and its grids set, so that nothing equals a fresh model's by chance.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from featherweight.edits import apply, replay
from featherweight.errors import EditError
from featherweight.plan import Edit, Factor, FakeQuant, Fold, Plan, Slice, Swap, Tie
from tests.edits.snapshot import snapshot


class Net(nn.Module):
    """Something for each kind of edit: channels to cut, a wide layer, an attention, twins to tie, inputs to round."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
        self.mix = nn.Conv2d(6, 8, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)
        self.words = nn.Embedding(5, 8)
        self.head = nn.Linear(8, 5, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.mix(self.depthwise(torch.relu(self.norm(self.stem(x))))).flatten(2).transpose(1, 2)
        h = h + self.attention(h, h, h)[0]
        return self.head(torch.relu(self.right(self.left(h))).mean(1))


CUT = (0, 2, 3, 5)
KINDS: dict[str, tuple[Edit, ...]] = {
    "slice": (
        *(Slice(name, 0, CUT) for name in ("stem.weight", "stem.bias", "norm.weight", "norm.bias")),
        *(Slice(name, 0, CUT) for name in ("norm.running_mean", "norm.running_var")),
        *(Slice(name, 0, CUT) for name in ("depthwise.weight", "depthwise.bias")),
        Slice("mix.weight", 1, CUT),
    ),
    "factor": (Factor("left", rank=3),),
    "swap": (Swap("attention", to="attention"),),
    "tie": (Tie(("left.weight", "right.weight")), Tie(("left.bias", "mix.bias"))),
    "fold": (Fold("stem", "norm"),),
    "dynamic": (FakeQuant("right", 8, False, dynamic=True),),
    "fake_quant": (FakeQuant("stem", 8, True), FakeQuant("right", 4, False), FakeQuant("attention", 8, True)),
}
KINDS["all five"] = (
    *KINDS["slice"],
    *KINDS["swap"],
    Slice("attention.q.weight", 0, (4, 5, 6, 7)),
    Slice("attention.q.bias", 0, (4, 5, 6, 7)),
    Slice("attention.k.weight", 0, (4, 5, 6, 7)),
    Slice("attention.k.bias", 0, (4, 5, 6, 7)),
    Slice("attention.v.weight", 0, (4, 5, 6, 7)),
    Slice("attention.v.bias", 0, (4, 5, 6, 7)),
    Slice("attention.out.weight", 1, (4, 5, 6, 7)),
    Factor("left", rank=4),
    Factor("right", rank=4),
    Slice("left.0.weight", 0, (0, 1, 3)),
    Slice("left.1.weight", 1, (0, 1, 3)),
    Slice("right.0.weight", 0, (0, 1, 3)),
    Slice("right.1.weight", 1, (0, 1, 3)),
    Tie(("left.0.weight", "right.0.weight")),
    Tie(("left.1.weight", "right.1.weight")),
    FakeQuant("stem", 8, True),
    FakeQuant("left", 8, False),
    FakeQuant("right.1", 8, False),
    FakeQuant("attention.out", 4, True),
)


def train(model: nn.Module) -> None:
    """Moves every value: factors from zero, running statistics, and grids."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("input_grid.scale"):
                tensor.fill_(0.07)
            elif name.endswith("input_grid.zero_point"):
                tensor.fill_(-3)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(4, 1, 8, 8)), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()


def ties(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_replayed_and_loaded_answers_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = Net()
    live = Plan(KINDS[kind])
    for edit in live.edits:
        apply(model, edit)
    train(model)
    model.eval()
    (tmp_path / "plan.json").write_text(live.to_json())
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")

    torch.manual_seed(2)
    again = Net()
    replay(again, Plan.from_json((tmp_path / "plan.json").read_text()).edits)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    again.eval()
    x = torch.randn(3, 1, 8, 8)
    expected = model(x)
    assert torch.equal(again(x), expected)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert repr(again) == repr(model)
    assert ties(again) == ties(model)
    assert ["words.weight", "head.weight"] in ties(again)
    assert not torch.equal(Net().eval()(x), expected)


def test_all_five_kinds_are_here() -> None:
    assert {edit.kind for edit in KINDS["all five"]} == {"slice", "factor", "swap", "tie", "fake_quant"}


def test_edits_draw_no_random_numbers() -> None:
    """A run with an edit in it and one resumed after it go on with the same shuffles and dropout."""
    model = Net()
    state = torch.get_rng_state()
    replay(model, KINDS["all five"])
    assert torch.equal(torch.get_rng_state(), state)


def test_parameters_that_stay_keep_their_identity() -> None:
    model = Net()
    before = dict(model.named_parameters())
    replay(model, KINDS["all five"])
    after = dict(model.named_parameters())
    replaced = {"attention.in_proj_weight", "attention.in_proj_bias", "left.weight", "right.weight"}
    renamed = {"attention.out_proj": "attention.out", "left.bias": "left.1.bias", "right.bias": "right.1.bias"}
    for name, parameter in before.items():
        if name not in replaced:
            new = name
            for old, now in renamed.items():
                new = new.replace(old, now)
            assert after[new] is parameter, name


def test_a_plan_that_does_not_fit_names_the_edit() -> None:
    model = Net()
    with pytest.raises(EditError, match=r"edit 1 of the plan \(Factor\(layer='lefft', rank=3\)\).*Nearest: left"):
        replay(model, (Slice("norm.weight", 0, CUT), Factor("lefft", rank=3)))


def test_what_is_no_edit_is_refused() -> None:
    model = Net()
    before = snapshot(model)
    with pytest.raises(EditError, match="'slice' is not an edit; the kinds are Slice, Factor"):
        apply(model, "slice")  # type: ignore[arg-type]
    assert snapshot(model) == before
