# SPDX-License-Identifier: Apache-2.0
"""What goes wrong with channels: each slip a clear error or a reported freeze, and the model left as it was."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featherweight as fw
from featherweight.errors import (
    DataError,
    EditError,
    FeatherweightError,
    GraphError,
    NothingToCompress,
    OptionError,
    VerifyError,
)

X, Y = torch.randn(8, 3, 8, 8), torch.randint(10, (8,))


def make_model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 10)
    )


def make_task(model: nn.Module | None = None, **options: Any) -> fw.Task:
    facts = {"train": [(X, Y)], "loss": lambda out, batch: F.cross_entropy(out, batch[1])}
    return fw.Task(model or make_model(), (X[:2],), **{**facts, **options})


class Convs(nn.Module):
    """Two convolutions and a head, with something between that a user might write."""

    def __init__(self, between: Callable[[Tensor], Tensor], made: int = 8, read: int = 8, groups: int = 1) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, made, 3), nn.Conv2d(read, 8, 3, groups=groups)
        self.head = nn.Linear(8, 10)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.between(self.a(x))).mean((2, 3)))


def through_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(x.detach().numpy().copy())  # where the graph ends


def branching(x: Tensor) -> Tensor:
    if x.sum() > 0:  # where the forward branches
        return x.relu()
    return x


@pytest.fixture
def model() -> Iterator[nn.Module]:
    """A model that must be afterwards what it was before."""
    found = make_model()
    before = {name: tensor.clone() for name, tensor in found.state_dict().items()}
    modes = [module.training for module in found.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in found.modules()]
    yield found
    after = found.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert [module.training for module in found.modules()] == modes
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in found.modules()] == hooks


# Cutting by hand


CUTS: list[tuple[Callable[[nn.Module, fw.Trace], Any], type[Exception], str]] = [
    (lambda m, t: fw.cut(m, t["0"], trace=t, inputs=(X,)), EditError, "all 8 couplings of 0 would be cut"),
    (lambda m, t: fw.cut(m, [*t["0"][:3], *t["3"]], trace=t, inputs=(X,)), EditError, "all 6 couplings of 3"),
    (lambda m, t: fw.cut(m, t["5"][:2], trace=t, inputs=(X,)), GraphError, "no group is named '5'"),
    (lambda m, t: fw.cut(m, [fw.Coupling("0", 8)], trace=t, inputs=(X,)), EditError, "there is no number 8"),
    (lambda m, t: fw.cut(m, t["0"][0], trace=t, inputs=(X,)), OptionError, r"trace\['fc'\]\[:4\]"),
    (lambda m, t: fw.cut(m, [0, 1], trace=t, inputs=(X,)), OptionError, "couplings of a trace.*got 0"),
    (lambda m, t: fw.cut(m, t["0"][:2], trace=t), OptionError, "pass `inputs`"),
    (lambda m, t: fw.cut(m, t["0"][:2], trace=t, inputs=X), OptionError, r"for one tensor: \(x,\)"),
    (lambda m, t: fw.cut(m, t["0"][:2], trace=t, inputs=(X[:, :1],)), EditError, "does not run on the inputs.*channels"),
    (lambda m, t: fw.cut(m, t["0"][:2], trace=t, inputs=(X,), follow=[3]), FeatherweightError, "follow"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "said"), CUTS, ids=[said for *_, said in CUTS])
def test_a_cut_that_cannot_be_is_an_error_and_nothing_is_cut(
    model: nn.Module, call: Any, error: type[Exception], said: str
) -> None:
    trace = fw.trace(model, (X,))
    with pytest.raises(error, match=said):
        call(model, trace)


def test_a_stale_trace_is_refused() -> None:
    model = make_model()
    trace = fw.trace(model, (X,))
    fw.cut(model, trace["0"][:3], trace=trace, inputs=(X,))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        EditError, match=r"stale: 0.weight was \(8, 3, 3, 3\).*is \(5, 3, 3, 3\) now.*trace the model anew"
    ):
        fw.cut(model, trace["3"][:1], trace=trace, inputs=(X,))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# Models that cannot be followed


@pytest.mark.parametrize(
    ("inputs", "error", "said"),
    [
        (X, OptionError, r"give a tuple, for one tensor: \(x,\)"),
        ((X[:, :1],), GraphError, "got 1 channels.*what does not run cannot be traced"),
        ({"y": X}, GraphError, "unexpected keyword argument 'y'"),
    ],
)
def test_inputs_that_the_model_does_not_take_are_an_error(
    model: nn.Module, inputs: Any, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        fw.trace(model, inputs)


def line_of(text: str) -> int:
    with open(__file__, encoding="utf-8") as file:
        return next(i for i, line in enumerate(file, start=1) if text in line)


def test_a_branch_on_the_data_is_named_by_file_and_line(capsys: pytest.CaptureFixture[str]) -> None:
    trace = fw.trace(Convs(branching), (X,))
    assert capsys.readouterr() == ("", "")  # torch.export prints whole graphs of what it could not do
    assert trace.front == "recorded" and trace.groups
    where = f"{__file__.rpartition('/')[2]}:{line_of('# where the forward branches')}"
    assert any(where in note for note in trace.notes)
    assert any("only the path of these inputs was seen" in note for note in trace.notes)


def test_what_leaves_torch_is_frozen_and_the_method_says_where() -> None:
    model = Convs(through_numpy)
    where = f"{__file__.rpartition('/')[2]}:{line_of('# where the graph ends')}"
    trace = fw.trace(model, (X,))
    assert "a" not in [group.name for group in trace.groups]
    with pytest.raises(NothingToCompress, match=f"torch.export failed.*{where}"):
        fw.PruneChannels({"macs": "50 %"}, importance="magnitude", layers=["*"], keep=["b.*"])(
            model, make_task(model), fw.Stage()
        )


def test_sizes_written_as_numbers_are_refused_with_the_line() -> None:
    model = Convs(lambda x: x.view(len(x), 2, 4, 6, 6).flatten(1, 2))  # a number where a size should be
    before = copy.deepcopy(model.state_dict())
    trace = fw.trace(model, (X,))
    with pytest.raises(VerifyError, match=f":{line_of('# a number where')} in <lambda>"):
        fw.cut(model, trace["a"][:1], trace=trace, inputs=(X,))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("model", "takes"),
    [
        (Convs(nn.GroupNorm(4, 8)), 2),
        (Convs(nn.Identity(), groups=2), 2),
        (Convs(nn.PixelShuffle(2), made=12, read=3), 4),
    ],
    ids=["GroupNorm", "conv groups", "pixel shuffle"],
)
def test_counts_that_must_divide_cannot_be_broken(model: Convs, takes: int) -> None:
    """One coupling takes so many channels along that what must divide still does; PyTorch itself says whether it runs."""
    trace, made = fw.trace(model, (X,)), model.a.out_channels
    fw.cut(model, trace["a"][:1], trace=trace, inputs=(X,))
    assert model.a.out_channels == made - takes and model(X).shape == (8, 10)


# Methods


TARGETS = [
    ({"macs": 0.5}, "the share kept is written macs='50 %'"),
    ({"macs": "0 %"}, "neither an amount"),
    ({"macs": "150 %"}, "neither an amount"),
    ({"flops": "50 %"}, "none of macs"),
    ({}, "until says what to come down to"),
    (0.5, "until says what to come down to"),
]


@pytest.mark.parametrize(("until", "said"), TARGETS, ids=[str(until) for until, _ in TARGETS])
@pytest.mark.parametrize("method", [fw.PruneChannels, fw.GradualChannelPruning])
def test_a_target_that_is_none_is_an_error_when_the_method_is_made(method: Any, until: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        method(until)


def test_a_target_beyond_reach_empties_no_layer_and_is_reported() -> None:
    task, events = make_task(), []  # type: ignore[var-annotated]
    model = copy.deepcopy(task.model)
    fw.PruneChannels({"macs": "0.01 %"}, importance="magnitude", batch_norm=False)(
        model, task, fw.Stage(report=events.append)
    )
    assert [layer.out_channels for layer in (model[0], model[3])] == [1, 1]
    [unmet] = [event["text"] for event in events if event["kind"] == "unmet"]
    assert "not the" in unmet and "asked for" in unmet and "least" in unmet
    assert model(X).shape == (8, 10)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"layers": ["5*"]}, NothingToCompress, "5.weight axis 0: it is an output of the model"),
        ({"least": 64}, NothingToCompress, "it has 8 channels, and least=64 stay"),
        ({"multiple": 16}, NothingToCompress, "no more than multiple=16"),
        ({"keep": ["head"]}, NothingToCompress, "keep: 'head' matches none"),
        ({"exact": True, "keep": ["*"]}, NothingToCompress, r"keep='\*' names"),
    ],
)  # fmt: skip
def test_options_that_leave_nothing_are_an_error_with_reasons(
    model: nn.Module, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    method = fw.PruneChannels({"macs": "50 %"}, importance="magnitude", **options)
    with pytest.raises(error, match=said) as caught:
        method(model, make_task(model), fw.Stage())
    assert "kernel" not in str(caught.value)


def test_the_head_that_nobody_kept_is_frozen_by_itself() -> None:
    task = make_task()
    model = copy.deepcopy(task.model)
    fw.PruneChannels({"macs": "30 %"}, importance="magnitude")(model, task, fw.Stage())
    assert model[5].out_features == 10 and model(X).shape == (8, 10)


# Teachers


class Answers(nn.Module):
    """A teacher that answers as it pleases."""

    def __init__(self, inputs: int, classes: int, wrap: Callable[[Tensor], Any] = lambda x: x) -> None:
        super().__init__()
        self.fc, self.wrap = nn.Linear(inputs, classes), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.fc(x.flatten(1)))


TEACHERS = [
    (Answers(192, 7), OptionError, r"student gives Tensor\[8, 10\].*teacher Tensor\[8, 7\].*CWD, CIRKD and Features"),
    (Answers(50, 10), DataError, "the teacher could not be run.*Task.forward"),
    (Answers(192, 10, lambda y: {"scores": y}), OptionError, "outputs=lambda outputs"),
    (Answers(192, 10, lambda y: y[None]), OptionError, r"Tensor\[1, 8, 10\]"),
    ("resnet", OptionError, "not a torch.nn.Module"),
]


@pytest.mark.parametrize(
    ("teacher", "error", "said"), TEACHERS, ids=["other classes", "other inputs", "a dict", "another rank", "a name"]
)
def test_a_teacher_that_cannot_be_compared_is_an_error_before_training(
    model: nn.Module, teacher: Any, error: type[Exception], said: str
) -> None:
    def train() -> None:
        distilling = fw.Distill([fw.KL()], teacher=teacher)
        fw.Train(steps=3, lr=0.1, distill=distilling)(model, make_task(), fw.Stage())

    with pytest.raises(error, match=said):
        train()
