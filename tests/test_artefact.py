# SPDX-License-Identifier: Apache-2.0
"""What is saved is loaded, in this process and in a fresh one, to the last bit; what is damaged is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import featherweight as fw
from featherweight.artefact import claim
from featherweight.edits import replay
from featherweight.errors import ArtefactError
from featherweight.plan import Plan


class Net(nn.Module):
    """A bit of everything: ties, a buffer, an LSTM, a norm with an integer buffer, two paths to one module."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.norm = nn.BatchNorm1d(8)
        self.fc = nn.Linear(8, 8)
        self.again = self.fc
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.words.weight
        self.register_buffer("offset", torch.randn(8))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, _ = self.lstm(self.words(tokens))
        x = self.norm(x.transpose(1, 2)).transpose(1, 2) + self.offset
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.again(self.fc(x)))


def equal(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def sparse_net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data[torch.rand_like(parameter) < 0.8] = 0.0
    model(torch.randint(0, 20, (3, 5)))  # moves the norm's statistics
    return model


PLAN = Plan(
    (
        fw.Swap("attention", "attention"),
        fw.Tie(("attention.q.weight", "attention.k.weight")),
        fw.FakeQuant("fc", 8, False),
        *(fw.Slice(name, 0, (0, 2, 3, 5, 6, 7)) for name in ("attention.out.weight", "attention.out.bias")),
        fw.Slice("attention.out.weight", 0, (0, 1, 2, 3)),
        fw.Factor("attention.v", 3),
    )
)


@pytest.mark.parametrize("plan", [Plan(), PLAN], ids=["values", "every kind of edit"])
def test_a_fresh_model_becomes_the_saved_one(tmp_path: Path, plan: Plan) -> None:
    model = sparse_net()
    replay(model, plan.edits)
    fw.save(model, plan, tmp_path / "run")
    again = fw.load(Net(), tmp_path / "run")
    assert equal(model, again)
    assert again.head.weight is again.words.weight
    assert again.again is again.fc
    if not plan.edits:
        tokens = torch.randint(0, 20, (2, 4))
        assert torch.equal(model.eval()(tokens), again.eval()(tokens))
    else:
        assert again.attention.q.weight is again.attention.k.weight


def test_a_new_process_loads_it_without_pickle(tmp_path: Path) -> None:
    model = sparse_net().eval()
    fw.save(model, Plan(), tmp_path / "run")
    tokens = torch.arange(8).reshape(2, 4)
    code = f"""
import pickle, torch
import featherweight as fw
from tests.test_artefact import Net
pickle.load = pickle.loads = pickle.Unpickler = torch.load = None
model = fw.load(Net(), {str(tmp_path / "run")!r}).eval()
print(model(torch.arange(8).reshape(2, 4)).double().sum().item())
"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert float(out.stdout) == pytest.approx(model(tokens).double().sum().item(), rel=1e-12)


def test_half_precision_loads_into_a_fresh_float_model(tmp_path: Path) -> None:
    model = nn.Linear(4, 4).bfloat16()
    fw.save(model, Plan(), tmp_path / "run")
    again = fw.load(nn.Linear(4, 4), tmp_path / "run")
    assert again.weight.dtype == torch.bfloat16
    assert equal(model, again)


def test_a_tie_made_by_hand_is_rebuilt(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    model = make()
    model[1].weight = model[0].weight
    fw.save(model, Plan(), tmp_path / "run")
    again = fw.load(make(), tmp_path / "run")
    assert again[1].weight is again[0].weight


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    fw.save(nn.Sequential(nn.Linear(4, 4)), Plan(), tmp_path / "run")
    with pytest.raises(ArtefactError, match=r"the model needs 1\.weight"):
        fw.load(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2, bias=False)), tmp_path / "run")
    with pytest.raises(ArtefactError, match=r"0\.weight.*\[4, 4\].*\[4, 5\]"):
        fw.load(nn.Sequential(nn.Linear(5, 4)), tmp_path / "run")
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fw.save(tied, Plan(), tmp_path / "free")
    tied[1].weight = tied[0].weight
    with pytest.raises(ArtefactError, match="one tensor on one side only"):
        fw.load(tied, tmp_path / "free")


def test_a_damaged_or_mixed_folder_is_refused_before_the_model_is_touched(tmp_path: Path) -> None:
    one, other = sparse_net(1), sparse_net(2)
    fw.save(one, Plan(), tmp_path / "one")
    fw.save(other, Plan(), tmp_path / "other")
    (tmp_path / "one" / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    fresh = sparse_net(3)
    with pytest.raises(ArtefactError, match=r"not the file that plan\.json was written with"):
        fw.load(fresh, tmp_path / "one")
    plan = tmp_path / "other" / "plan.json"
    plan.write_text(plan.read_text()[:-20])
    with pytest.raises(ArtefactError, match=r"plan\.json"):
        fw.load(fresh, tmp_path / "other")
    assert equal(fresh, sparse_net(3))


def test_folders_that_are_no_artefact_say_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="is not a folder"):
        fw.load(Net(), tmp_path / "gone")
    with pytest.raises(ArtefactError, match="right folder"):
        fw.load(Net(), tmp_path)
    (tmp_path / ".work").mkdir()
    with pytest.raises(ArtefactError, match="--resume"):
        fw.load(Net(), tmp_path)


def test_a_newer_plan_is_refused(tmp_path: Path) -> None:
    fw.save(nn.Linear(2, 2), Plan(), tmp_path / "run")
    path = tmp_path / "run" / "plan.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 2}))
    with pytest.raises(ArtefactError, match="version 2"):
        fw.load(nn.Linear(2, 2), tmp_path / "run")


def test_an_artefact_is_not_overwritten_unasked(tmp_path: Path) -> None:
    fw.save(nn.Linear(2, 2), Plan(), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ArtefactError, match="overwrite"):
        fw.save(nn.Linear(2, 2), Plan(), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    fw.save(nn.Linear(2, 2), Plan(), tmp_path, overwrite=True)
    assert (tmp_path / "model.safetensors").read_bytes() != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "plan.json"]


def test_one_folder_holds_one_run(tmp_path: Path) -> None:
    with claim(tmp_path / "run"):
        with pytest.raises(ArtefactError, match="in use"), claim(tmp_path / "run", overwrite=True):
            pass
        code = f"from featherweight.artefact import claim\nfrom pathlib import Path\nwith claim(Path({str(tmp_path / 'run')!r})): pass"
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "in use by another run" in out.stderr
    with claim(tmp_path / "run"):
        pass


def test_an_unwritable_folder_is_known_before_anything_is_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match="cannot be written"), claim(tmp_path / "file" / "run"):
        pass


def test_state_that_is_not_a_tensor_is_named(tmp_path: Path) -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> object:
            return {"a": 1}

        def set_extra_state(self, state: object) -> None: ...

    with pytest.raises(ArtefactError, match=r"0\._extra_state is dict"):
        fw.save(nn.Sequential(Odd(2, 2)), Plan(), tmp_path / "run")
