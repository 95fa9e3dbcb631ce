# SPDX-License-Identifier: Apache-2.0
"""`featherweight inspect` on what goes together: groups, what is frozen where, trials, and the tables of heads."""

from pathlib import Path

import pytest
import torch
from torch import nn

from .conftest import Run

NETS = '''
import torch
from torch import nn
import featherweight as fw


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.b(torch.relu(self.a(x)))
        return self.head(x.mean((2, 3)))


class Branch(Residual):
    def forward(self, x):
        if x.sum() > 0:  # the line to be named
            x = x + 1
        return super().forward(x)


class Opaque(nn.Module):
    """Runs, and cannot be traced in any way."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.fc(x)
        if type(self.fc.weight) is not nn.Parameter or type(x) is not torch.Tensor or torch.compiler.is_exporting():
            raise RuntimeError("eager only")
        from torch.fx.experimental.proxy_tensor import get_proxy_mode
        if get_proxy_mode() is not None:
            raise RuntimeError("eager only")  # where it stops
        return self.head(x)


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(12, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.c(self.b(self.a(x).view(-1, 4, 3).flatten(1).view(-1, 12)))


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (3, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


def heads(**options):
    torch.manual_seed(0)
    model, x = Heads(), torch.randn(4, 5, 6)
    return fw.Task(model, (x,), evaluate=lambda net: float(net(x).square().mean()), metric="energy", samples=4, **options)


def lower():
    return heads(higher_is_better=False)


def no_metric():
    return fw.Task(Heads(), (torch.randn(4, 5, 6),))
'''  # fmt: skip


@pytest.fixture(autouse=True)
def nets(project: Path) -> None:
    (project / "nets.py").write_text(NETS)


def test_groups_tell_who_makes_and_reads_them_and_what_one_coupling_frees(run: Run) -> None:
    result = run("inspect", "nets:Residual", "--input", "2x3x4x4", "--json")
    assert result.exit_code == 0, result.stderr
    trace = result.answer["trace"]
    stem, inner = trace["groups"]
    assert (stem["name"], stem["couplings"], inner["name"], inner["couplings"]) == ("stem", 8, "a", 6)
    # By hand: a channel of the stem is 3*9+1 weights there, a column of a (6), a row of b (6+1), a column of the head (5).
    assert stem["parameters"] == 28 + 6 + 7 + 5
    assert inner["parameters"] == (8 + 1) + 8
    # And multiply-adds on 2 x 4 x 4 positions, of the head on 2.
    assert stem["macs"] == 32 * (27 + 6 + 6) + 2 * 5
    assert inner["macs"] == 32 * (8 + 8)
    assert {(m["tensor"], m["axis"], m["role"]) for m in inner["members"]} == {
        ("a.weight", 0, "output"), ("a.bias", 0, "output"), ("b.weight", 1, "input"),
    }  # fmt: skip
    told = run("inspect", "nets:Residual", "--input", "2x3x4x4").stdout
    row = next(line for line in told.splitlines() if line.startswith("stem   8 channels"))
    assert row.split() == ["stem", "8", "channels", "stem,", "b", "a,", "head", "46", "1,258", "stay"]
    assert "it is an output of the model" in told and "Traced by torch.export." in told


def test_kernels_and_single_positions_are_not_listed_as_frozen(run: Run) -> None:
    frozen = run("inspect", "nets:Residual", "--input", "2x3x4x4", "--json").answer["trace"]["frozen"]
    axes = {(axis["tensor"], axis["axis"]) for line in frozen for axis in line["axes"]}
    assert axes == {("head.weight", 0), ("head.bias", 0), ("stem.weight", 1)}


def test_without_inputs_nothing_is_traced(run: Run) -> None:
    assert "trace" not in run("inspect", "nets:Residual", "--json").answer


def line_of(text: str) -> int:
    return next(i for i, line in enumerate(NETS.splitlines(), start=1) if text in line)


def test_a_branch_on_data_is_named_by_file_and_line(run: Run) -> None:
    result = run("inspect", "nets:Branch", "--input", "2x3x4x4")
    assert result.exit_code == 0
    assert f"nets.py:{line_of('the line to be named')} in forward: if x.sum() > 0:" in result.stdout
    assert "a branch that they do not take is not seen" in result.stdout


def test_a_model_that_cannot_be_traced_still_has_its_layers_shown(run: Run) -> None:
    result = run("inspect", "nets:Opaque", "--input", "2x8", "--json")
    assert result.exit_code == 0, result.stderr
    assert [layer["name"] for layer in result.answer["layers"]] == ["fc", "head"]
    assert f"nets.py:{line_of('where it stops')}" in result.answer["trace"]["error"]
    told = run("inspect", "nets:Opaque", "--input", "2x8")
    assert told.exit_code == 0 and "eager only" in told.stderr and "fc " in told.stdout
    assert run("inspect", "nets:Opaque", "--input", "2x8", "--try").exit_code == 2


def test_a_trial_says_which_groups_the_code_does_not_bear(run: Run) -> None:
    result = run("inspect", "nets:Fixed", "--input", "4x8", "--try", "--json")
    refused = {group["name"]: group["refused"] for group in result.answer["trace"]["groups"]}
    assert refused["b"] is None and "nets.py" in refused["a"]
    told = run("inspect", "nets:Fixed", "--input", "4x8", "--try").stdout
    assert "1 of 2 groups can be cut in the model's own code." in told


@pytest.mark.parametrize(("name", "best"), [("heads", max), ("lower", min)])
def test_heads_are_measured_one_by_one(run: Run, project: Path, name: str, best: object) -> None:
    """Oracle: the columns of the output layer that read a head, set to zero by hand."""
    result = run("inspect", "--task", f"nets:{name}", "--heads", "--json")
    assert result.exit_code == 0, result.stderr
    import nets

    task = nets.heads()
    model: nn.Module = task.model

    def without(*heads: int) -> float:
        kept = model.out.weight.detach().clone()  # type: ignore[union-attr]
        with torch.no_grad():
            for head in heads:
                model.out.weight[:, 2 * head : 2 * head + 2] = 0  # type: ignore[union-attr,index]
            value = task.evaluate(model)
            model.out.weight.copy_(kept)  # type: ignore[union-attr,operator]
        return float(value)

    found = result.answer["heads"]
    assert found["metric"] == pytest.approx(without()) and found["name"] == "energy"
    assert found["without"]["q"] == pytest.approx([without(i) for i in range(3)])
    alone = [without(*({0, 1, 2} - {i})) for i in range(3)]
    head, value = found["best"]["q"]
    assert value == pytest.approx(best(alone)) and alone[head] == pytest.approx(value)  # type: ignore[operator]
    told = run("inspect", "--task", f"nets:{name}", "--heads").stdout
    assert "energy without a single head" in told and f"head {head} of 3" in told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nets:Heads", "--heads"], "--task package.module:function"),
        (["--task", "nets:no_metric", "--heads"], "evaluate="),
        (["--task", "tasks:task", "--heads"], "No attention heads can be told apart"),
        (["nets:Residual", "--grain", "dim"], "'dims'"),
    ],
)
def test_heads_without_a_metric_or_heads_are_answered_with_2(run: Run, words: list[str], said: str) -> None:
    result = run("inspect", *words)
    assert result.exit_code == 2 and said in result.stderr, result.stderr
