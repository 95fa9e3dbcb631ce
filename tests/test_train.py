# SPDX-License-Identifier: Apache-2.0
"""Oracle: the same loop written out by hand in a dozen lines of plain torch."""

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, mse_loss
from torch.utils.data import DataLoader, TensorDataset

import featherweight.train
from featherweight.distill import CIRKD, KL, Attention, Distill, Features, Loss
from featherweight.errors import DataError, NumericalError, OptionError
from featherweight.plan import Plan
from featherweight.prune import GradualPruning
from featherweight.task import Stage, Task
from featherweight.train import Train


def loader(n: int = 40, batch: int = 8, shuffle: bool = True) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 6, generator=generator)
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=batch, shuffle=shuffle)


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))


def task(model: nn.Module, **options: Any) -> Task:
    options = {"train": loader(), "loss": lambda out, batch: cross_entropy(out, batch[1]), **options}
    return Task(model, (torch.randn(2, 6),), **options)


def equal(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(x == y and torch.equal(u, v) for (x, u), (y, v) in pairs)


def test_the_loop_is_the_plain_loop() -> None:
    model = network()
    model[2].eval()
    Train(steps=13, lr=0.05, optimizer="sgd", momentum=0.8, schedule="linear", warmup=3, weight_decay=0.01)(
        model, task(model), Stage(seed=5)
    )
    plain, data = network(), loader()
    torch.manual_seed(5)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.8, weight_decay=0.01)
    step = 0
    while step < 13:
        for x, y in data:
            lr = 0.05 * ((step + 1) / 4 if step < 3 else 1 - (step - 3) / 10)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            cross_entropy(plain(x), y).backward()
            optimizer.step()
            step += 1
            if step == 13:
                break
    assert equal(model, plain)
    assert model.training
    assert not model[2].training


class Counting:
    """A hook with state that acts on the weights, so that a wrong restore shows in them."""

    def attach(self, model: nn.Module, optimizer: Any, example_inputs: Any = None) -> Any:
        attached = Counting()
        attached.model, attached.t = model, 0
        return attached

    def step(self) -> dict[str, Any]:
        self.t += 1
        with torch.no_grad():
            self.model[0].weight += 1e-3 * self.t * torch.rand(())
        return {"t": self.t}

    def finalize(self) -> Plan:
        return Plan(formats={"0.weight": f"t:{self.t}"})

    def state_dict(self) -> dict[str, Any]:
        return {"t": self.t}

    def load_state_dict(self, state: Any) -> None:
        self.t = state["t"]


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop", [0, 3, 5, 8, 10, 16])
@pytest.mark.parametrize("every", [2, 1000])
def test_a_run_that_died_goes_on_to_the_same_weights(tmp_path: Path, stop: int, every: int) -> None:
    """Five steps an epoch: deaths before the first checkpoint, in an epoch and right after one."""
    options = Train(steps=17, hooks=[Counting()], checkpoint_every=every, evaluate_every=4)

    def evaluate(m: Any) -> float:
        return float(torch.rand(())) + float(m(torch.ones(3, 6)).sum())

    whole = network()
    history: list[Any] = []
    plan = options(whole, task(whole, evaluate=evaluate), Stage(seed=7, report=history.append))
    assert plan.formats == {"0.weight": "t:17"}

    died = network()
    count = 0

    def dies(out: torch.Tensor, batch: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        if count > stop:
            raise Stop
        return cross_entropy(out, batch[1])

    with pytest.raises(Stop):
        options(died, task(died, loss=dies, evaluate=evaluate), Stage(seed=7, folder=tmp_path))
    resumed = network()
    again: list[Any] = []
    torch.manual_seed(999)
    options(resumed, task(resumed, evaluate=evaluate), Stage(seed=7, folder=tmp_path, resume=True, report=again.append))
    assert equal(whole, resumed)
    records = [[e for e in events if e["kind"] == "record"] for events in (history, again)]
    assert records[0] == records[1]
    if stop >= 5:
        assert any(e["kind"] == "resumed" for e in again)


def test_looking_does_not_change_what_is_looked_at() -> None:
    models = [network(), network()]
    for model, evaluate in zip(
        models, (None, lambda m: float(torch.rand(())) + m(torch.ones(2, 6)).sum().item()), strict=True
    ):
        Train(steps=6, evaluate_every=2)(model, task(model, evaluate=evaluate), Stage())
    assert equal(*models)


def test_zeros_of_an_earlier_stage_stay() -> None:
    model = network()
    model[0].weight.data[:, 2] = 0
    moved = model[4].weight.detach().clone()
    Train(steps=6, lr=0.1, weight_decay=0.1)(model, task(model), Stage())
    assert (model[0].weight[:, 2].view(torch.int32) == 0).all()
    assert (model[0].weight[:, 1] != 0).all()
    assert not torch.equal(model[4].weight, moved)
    model(torch.randn(3, 6)).sum().backward()
    assert (model[0].weight.grad[:, 2] != 0).any(), "the hold ends with the stage"


def test_mixed_precision_leaves_a_plain_model() -> None:
    model = network()
    seen = []
    Train(steps=3, precision="bf16")(
        model,
        task(
            model,
            loss=lambda out, batch: (
                seen.append(torch.is_autocast_enabled("cpu")),
                cross_entropy(out.float(), batch[1]),
            )[1],
        ),
        Stage(),
    )
    assert seen[0]
    assert model(torch.randn(2, 6)).dtype == torch.float32
    assert "forward" not in vars(model)
    assert next(model.parameters()).dtype == torch.float32
    model.eval()
    x = torch.randn(2, 6)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    Train(steps=1, precision="no")(model, task(model), Stage())  # another precision in the same process


def test_bad_input_is_named() -> None:
    model = network()
    with pytest.raises(OptionError, match="steps or epochs"):
        Train()
    with pytest.raises(OptionError, match="Nearest: cosine"):
        Train(steps=1, schedule="cosin")
    with pytest.raises(OptionError, match="no attach"):
        Train(steps=1, hooks=[Stage()])
    with pytest.raises(OptionError, match="no loss"):
        Train(steps=1)(model, task(model, loss=None), Stage())
    with pytest.raises(DataError, match="empty"):
        Train(steps=1)(model, task(model, train=[]), Stage())
    with pytest.raises(DataError, match=r"Tensor\[2, 5\].*Tensor\[2, 6\]"):
        Train(steps=1)(model, task(model, train=[(torch.randn(2, 5), torch.zeros(2).long())]), Stage())
    with pytest.raises(OptionError, match="scalar"):
        Train(steps=1)(model, task(model, loss=lambda out, batch: out), Stage())
    with pytest.raises(NumericalError, match="by step 0"):
        Train(steps=9)(model, task(model, loss=lambda out, batch: mse_loss(out * float("nan"), out)), Stage())
    with pytest.raises(DataError, match="one-shot"):
        task(model, train=iter([1]))

    class Late(Counting):
        end = 5

    with pytest.raises(OptionError, match="ends at step 5, but training stops after step 4"):
        Train(steps=5, hooks=[Late()])(model, task(model), Stage())


def test_a_loader_that_dries_up_is_noticed() -> None:
    class Once:
        passes = 0

        def __iter__(self) -> Iterator[Any]:
            self.passes += 1
            if self.passes < 3:  # one pass to look, one to train
                yield from loader()

    model = network()
    with pytest.raises(DataError, match="later epoch, at step 5"):
        Train(steps=9)(model, task(model, train=Once()), Stage())


def test_an_error_lets_go_of_the_model() -> None:
    model = network()
    model[0].weight.data[0, 0] = 0
    with pytest.raises(NumericalError):
        Train(steps=3)(model, task(model, loss=lambda out, batch: out.sum() * float("inf")), Stage())
    assert not model[0].weight._post_accumulate_grad_hooks


def test_curves_are_thinned() -> None:
    events: list[Any] = []
    model = network()
    Train(steps=1000, optimizer="sgd", lr=1e-4)(model, task(model), Stage(report=events.append))
    records = [e for e in events if e["kind"] == "record"]
    assert len(records) <= featherweight.train._CURVE_POINTS * 1.5
    assert records[-1]["step"] == 1000
    assert sum(e["kind"] == "step" for e in events) == 1000


def with_teacher(**options: Any) -> Task:
    """The task's model is wider than the network, so that features are compared by a projection."""
    torch.manual_seed(8)
    teacher = nn.Sequential(nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, 2))
    teacher[3].eval()
    return task(teacher, **options)


def test_the_loop_with_a_teacher_is_the_plain_loop_with_one() -> None:
    """The projection is a layer like any other to the optimizer; the batches are those of a run without a teacher."""
    model, taught = network(), with_teacher()
    before = copy.deepcopy(taught.model)
    Train(
        steps=13,
        lr=0.05,
        optimizer="sgd",
        momentum=0.8,
        schedule="constant",
        distill=[KL(2.0, weight=0.7), Features("0")],
    )(model, taught, Stage(seed=5))
    plain, teacher, data = network(), copy.deepcopy(taught.model).eval(), loader()
    torch.manual_seed(5)
    projection = nn.Linear(16, 24)
    optimizer = torch.optim.SGD([*plain.parameters(), *projection.parameters()], lr=0.05, momentum=0.8)
    step = 0
    while step < 13:
        for x, y in data:
            out = plain(x)
            p, q = (teacher(x).detach() / 2).log_softmax(1), (out / 2).log_softmax(1)
            loss = cross_entropy(out, y) + 0.7 * 4 * kl_div(q, p, reduction="batchmean", log_target=True)
            loss = loss + mse_loss(projection(plain[0](x)), teacher[0](x).detach())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step == 13:
                break
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
    assert equal(taught.model, before)
    assert [m.training for m in taught.model.modules()] == [m.training for m in before.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*model.modules(), *taught.model.modules()))
    assert set(model.state_dict()) == set(network().state_dict())


@pytest.mark.parametrize("stop", [3, 16])
def test_a_distilled_run_that_died_goes_on_to_the_same_weights(
    tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Projections and their momentum are state; so is what waits for the next record, which not every step is."""
    monkeypatch.setattr(featherweight.train, "_CURVE_POINTS", 4)
    distill = [KL(), Features("0"), Attention("pixels"), cirkd()]
    options = Train(
        steps=17, lr=0.02, hooks=[GradualPruning(0.5, end=12, every=3)], distill=distill, checkpoint_every=2
    )
    taught = task(segmenter(6), train=pictures(), loss=lambda out, batch: cross_entropy(out, batch[1]))
    taught = dataclasses.replace(taught, example_inputs=(torch.zeros(1, 3, 4, 4),))
    whole, died, resumed = segmenter(4), segmenter(4), segmenter(4)
    history: list[Any] = []
    options(whole, taught, Stage(seed=7, report=history.append))
    count = 0

    def dies(out: torch.Tensor, batch: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        if count > stop:
            raise Stop
        return cross_entropy(out, batch[1])

    with pytest.raises(Stop):
        options(died, dataclasses.replace(taught, loss=dies), Stage(seed=7, folder=tmp_path))
    again: list[Any] = []
    torch.manual_seed(999)
    options(resumed, taught, Stage(seed=7, folder=tmp_path, resume=True, report=again.append))
    assert equal(whole, resumed)
    records = [[e for e in events if e["kind"] == "record"] for events in (history, again)]
    assert records[0] == records[1]
    assert all(0 < record["distill_loss"] < record["loss"] for record in records[0])


def cirkd() -> Loss:
    """Queues that overflow, and draws that matter: a resumed run must have both."""
    return CIRKD("pixels", classes=2, pixel_queue=20, region_queue=4, pixel_contrast=10, region_contrast=4)


def segmenter(width: int) -> nn.Sequential:
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, width, 1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.Dropout(0.2)]
    model = nn.Sequential(*layers)
    model.add_module("pixels", nn.Conv2d(width, width, 1))
    model.add_module("head", nn.Conv2d(width, 2, 1))
    return model


def pictures() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 3, 4, 4, generator=generator)
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=4, shuffle=True)


def test_records_have_the_distilled_part_and_the_whole() -> None:
    events: list[Any] = []
    taught = with_teacher()
    Train(steps=5, optimizer="sgd", lr=1e-12, distill=KL())(network(), taught, Stage(report=events.append))
    records = [e for e in events if e["kind"] == "record"]
    plain: list[Any] = []
    Train(steps=5, optimizer="sgd", lr=1e-12)(network(), taught, Stage(report=plain.append))
    for record, without in zip(records, (e for e in plain if e["kind"] == "record"), strict=True):
        assert record["loss"] - record["distill_loss"] == pytest.approx(without["loss"], rel=1e-5)
        assert record["distill_loss"] > 0
        assert "distill_loss" not in without


def test_a_teacher_alone_can_train() -> None:
    taught = with_teacher(loss=None)
    events: list[Any] = []
    model = network()
    Train(steps=200, lr=0.02, distill=KL(1.0))(model, taught, Stage(report=events.append))
    records = [e for e in events if e["kind"] == "record"]
    assert all(record["loss"] == record["distill_loss"] for record in records)
    x = torch.randn(100, 6)
    agreement = (model.eval()(x).argmax(1) == taught.model.eval()(x).argmax(1)).float().mean()
    assert agreement > 0.85


def test_another_teacher_than_the_tasks_own_model() -> None:
    taught, model = with_teacher(), network()
    other = copy.deepcopy(taught.model)
    with torch.no_grad():
        other[4].weight.neg_()
        other[4].bias.neg_()
    Train(steps=200, lr=0.02, distill=Distill(KL(1.0), teacher=other))(
        model, dataclasses.replace(taught, loss=None), Stage()
    )
    x = torch.randn(100, 6)
    assert (model.eval()(x).argmax(1) == other.eval()(x).argmax(1)).float().mean() > 0.85


def test_a_teacher_that_does_not_fit_is_refused_before_the_first_step() -> None:
    model = network()
    events: list[Any] = []
    wrong = Distill(KL(), teacher=nn.Sequential(nn.Linear(6, 3)))
    with pytest.raises(OptionError, match=r"KL, logits: the student gives Tensor\[8, 2\].*Tensor\[8, 3\]"):
        Train(steps=3, distill=wrong)(model, task(model), Stage(report=events.append))
    assert not [e for e in events if e["kind"] == "step"]
    assert equal(model, network())
    with pytest.raises(OptionError, match="the teacher is the student itself"):
        Train(steps=3, distill=KL())(model, task(model), Stage())
    with pytest.raises(OptionError, match="'kl' is no loss to distill by"):
        Train(steps=3, distill="kl")


def test_clipping_counts_what_is_learned_along() -> None:
    """The norm that is clipped is of all that the optimizer moves, and so is the step that it allows."""
    seen = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            seen.append(float(torch.stack([g.norm() for g in gradients]).norm()))
            return super().step(closure)

    options = {"steps": 2, "distill": Features("0"), "optimizer": lambda p: Watched(p, lr=0.1)}
    Train(**options)(network(), with_teacher(), Stage())
    Train(clip=0.01, **options)(network(), with_teacher(), Stage())
    assert min(seen[:2]) > 0.1
    assert max(seen[2:]) < 0.0101


def test_distillation_in_mixed_precision_is_summed_in_full() -> None:
    events: list[Any] = []
    Train(steps=4, precision="bf16", distill=[KL(), Features("0")])(
        network(), with_teacher(), Stage(report=events.append)
    )
    assert all(0 < e["distill_loss"] < 10 for e in events if e["kind"] == "record")
