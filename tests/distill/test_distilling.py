# SPDX-License-Identifier: Apache-2.0
"""Student and teacher at work: the sum is what the formulas give of what two plain forwards give, and nothing else moves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.distill import CIRKD, CWD, KL, Attention, Distill, Features
from featherweight.errors import DataError, OptionError
from tests.distill import formulas


class Net(nn.Module):
    """A small segmentation network of some width; `drop` and the norm tell training from evaluation."""

    def __init__(self, width: int = 6, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.body = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.body(self.drop(self.act(self.norm(self.stem(x)))))))


def nets(student: int = 6, teacher: int = 6) -> tuple[Net, Net]:
    torch.manual_seed(0)
    return Net(student), Net(teacher)


def batch_of(n: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(n, 3, 5, 5, generator=generator), torch.randint(0, 4, (n, 5, 5), generator=generator)


def state(model: nn.Module) -> dict[str, Any]:
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "devices": {tensor.device for tensor in model.state_dict().values()},
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    tensors = all(torch.equal(a["tensors"][name], b["tensors"][name]) for name in (*a["tensors"], *b["tensors"]))
    return tensors and all(a[key] == b[key] for key in ("modes", "hooks", "devices"))


def test_the_loss_is_the_weighted_sum_of_the_formulas() -> None:
    student, teacher = nets()
    student.eval()  # no dropout, so that a second forward is the same
    student, teacher = student.double(), teacher.double()  # a KL near zero is a small difference of large terms
    batch = batch_of()[0].double(), batch_of()[1]
    options = Distill([KL(2.0, weight=0.5), CWD(weight=3.0), Features({"stem": "body"}, weight=2.0), Attention("body")])
    distilling = options.attach(student, teacher, batch)
    found = float(distilling.loss(student(batch[0]), batch).detach())
    s, t = {}, {}
    for model, taken in ((student, s), (teacher.eval(), t)):
        x = model.stem(batch[0])
        taken["stem"] = x.detach().numpy()
        x = model.body(F.relu(model.norm(x)))
        taken["body"] = x.detach().numpy()
        taken["logits"] = model.head(F.relu(x)).detach().numpy()
    wanted = 0.5 * formulas.kl(s["logits"], t["logits"], 2.0, 1) + 3 * formulas.cwd(s["logits"], t["logits"], 4.0)
    wanted += 2 * ((s["stem"] - t["body"]) ** 2).mean() + formulas.attention_map(s["body"], t["body"], 2.0)
    assert found == pytest.approx(wanted, rel=1e-8)
    assert list(distilling.values) == ["KL", "CWD", "Features", "Attention"]
    assert float(distilling.values["CWD"]) == pytest.approx(formulas.cwd(s["logits"], t["logits"], 4.0), rel=1e-8)


def test_over_several_layers_a_loss_is_their_mean_and_two_of_a_kind_have_two_names() -> None:
    student, teacher = nets()
    batch = batch_of()
    student.eval()
    both = Distill([Features(["stem", "body"]), Features("stem"), Features("body")]).attach(student, teacher, batch)
    both.loss(student(batch[0]), batch)
    values = {name: float(value) for name, value in both.values.items()}
    assert values["Features"] == pytest.approx((values["Features 2"] + values["Features 3"]) / 2)


def test_gradients_reach_the_student_and_the_projection_and_nothing_else() -> None:
    student, teacher = nets(student=4)
    batch = batch_of()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    distilling = Distill([KL(), Features("body"), CIRKD("body", classes=4)]).attach(student, teacher, batch, optimizer)
    assert len(list(distilling.parameters())) == 4
    assert [id(p) for p in optimizer.param_groups[1]["params"]] == [id(p) for p in distilling.parameters()]
    distilling.loss(student(batch[0]), batch).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in distilling.parameters())
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert set(student.state_dict()) == set(Net().state_dict())


def test_a_loop_of_ones_own_brings_the_student_nearer_to_its_teacher() -> None:
    student, teacher = nets(student=4)
    batch = batch_of(8)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    distilling = Distill([KL(), CWD(layers="body")]).attach(student, teacher, batch, optimizer)
    values = []
    for _ in range(60):
        loss = distilling.loss(student(batch[0]), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(distilling.values["KL"]))
    assert sum(values[-5:]) < 0.5 * sum(values[:5])


def test_attaching_and_releasing_leave_both_models_as_they_were() -> None:
    student, teacher = nets(student=4)
    teacher.drop.eval()
    before = state(student), state(teacher)
    random = torch.get_rng_state()
    distilling = Distill([KL(), Features("body", project=None, axis=1), Attention("stem")]).attach(
        student, teacher, batch_of()
    )
    drawn_by_projection = torch.get_rng_state()
    assert not torch.equal(random, drawn_by_projection)
    assert not any(module.training for module in teacher.modules())
    assert student.training
    with torch.no_grad():
        student(batch_of()[0])  # changes the running statistics, by the user's hand
    student.norm.load_state_dict(
        {name.removeprefix("norm."): t for name, t in before[0]["tensors"].items() if "norm" in name}
    )
    distilling.release()
    assert same(state(student), before[0])
    assert same(state(teacher), before[1])


def test_without_a_projection_attaching_draws_no_random_number() -> None:
    student, teacher = nets()
    before = torch.get_rng_state()
    Distill([KL(), Features("body")]).attach(student, teacher, batch_of())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        (KL(layers="hed"), r"KL: the student has no module 'hed'. Nearest: 'head'"),
        (Features("body", project=False), "Features, layer 'body': .*project=False"),
        ([KL(), CIRKD("head", classes=4, project=False, axis=9)], "CIRKD, layer 'head'.*no axis 9"),
    ],
)
def test_what_cannot_be_distilled_is_refused_with_both_models_as_they_were(losses: Any, message: str) -> None:
    student, teacher = nets(student=4)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    before = state(student), state(teacher)
    with pytest.raises(OptionError, match=message):
        Distill(losses).attach(student, teacher, batch_of(), optimizer)
    assert same(state(student), before[0])
    assert same(state(teacher), before[1])
    assert len(optimizer.param_groups) == 1


def test_a_teacher_of_other_outputs_is_refused_before_the_first_step() -> None:
    student, _ = nets()
    with pytest.raises(OptionError, match=r"KL, logits: the student gives Tensor\[3, 4, 5, 5\].*Tensor\[3, 9, 5, 5\]"):
        Distill(KL()).attach(student, Net(classes=9), batch_of())
    with pytest.raises(DataError, match="the teacher could not be run on tuple"):
        Distill(KL()).attach(student, nn.Linear(7, 4), batch_of())
    with pytest.raises(OptionError, match="no teacher"):
        Distill(KL()).attach(student, batch=batch_of())

    class Pair(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x, x

    with pytest.raises(OptionError, match="the teacher answers tuple"):
        Distill(KL()).attach(student, Pair(), batch_of())


def test_a_teacher_that_would_learn_with_its_student_is_refused() -> None:
    student, teacher = nets()
    with pytest.raises(OptionError, match=r"is the student itself.*copy\.deepcopy"):
        Distill(KL()).attach(student, student, batch_of())
    teacher.head = student.head
    with pytest.raises(OptionError, match=r"shares head\.weight"):
        Distill(KL()).attach(student, teacher, batch_of())
    student.head.requires_grad_(False)
    Distill(KL()).attach(student, teacher, batch_of())


def test_the_teacher_answers_as_in_evaluation_whatever_is_done_to_its_mode() -> None:
    student, teacher = nets()
    batch = batch_of()
    student.eval()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    distilling = Distill(KL()).attach(student, teacher, batch)
    values = set()
    for _ in range(3):
        teacher.train()
        values.add(float(distilling.loss(student(batch[0]), batch).detach()))
    assert len(values) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_masked_and_physically_smaller_students_are_the_same_to_the_logits() -> None:
    """The same channels zeroed, or gone: KL and the gradients of what is left are equal."""
    student, teacher = nets()
    student.eval()
    kept, batch = [0, 2, 5], batch_of()
    small = Net(3).eval()
    with torch.no_grad():
        gone = [1, 3, 4]
        for tensor in (student.stem.weight, student.stem.bias, student.norm.weight, student.norm.bias):
            tensor[gone] = 0
        student.body.weight[gone] = 0
        student.body.bias[gone] = 0
        small.stem.weight.copy_(student.stem.weight[kept])
        small.stem.bias.copy_(student.stem.bias[kept])
        small.norm.load_state_dict({k: v[kept] if v.ndim else v for k, v in student.norm.state_dict().items()})
        small.body.weight.copy_(student.body.weight[kept][:, kept])
        small.body.bias.copy_(student.body.bias[kept])
        small.head.weight.copy_(student.head.weight[:, kept])
        small.head.bias.copy_(student.head.bias)
    gradients = []
    for model in (student, small):
        distilling = Distill([KL(), CWD(), Attention("body")]).attach(model, teacher, batch)
        distilling.loss(model(batch[0]), batch).backward()
        gradients.append(model.head.weight.grad)
        distilling.release()
    torch.testing.assert_close(gradients[0][:, kept], gradients[1])
    # Feature losses: the masked one is compared as it stands, the smaller one by a projection.
    assert not list(Distill(Features("body")).attach(student, teacher, batch).parameters())
    assert list(Distill(Features("body")).attach(small, teacher, batch).parameters())


def test_a_tapped_module_that_was_not_called_is_named() -> None:
    student, teacher = nets()
    batch = batch_of()
    distilling = Distill(Features("body")).attach(student, teacher, batch)
    outputs = student(batch[0])
    distilling.loss(outputs, batch)
    with pytest.raises(OptionError, match="Features, layer 'body': called 0 times in the student's last forward"):
        distilling.loss(outputs, batch)
    student.unused, teacher.unused = nn.Linear(1, 1), nn.Linear(1, 1)
    with pytest.raises(OptionError, match="layer 'unused': called 0 times"):
        Distill(Features("unused")).attach(student, teacher, batch)


def test_a_state_that_is_restored_goes_on_to_the_same_losses() -> None:
    batch = batch_of()
    options = Distill([KL(), Features("body"), CIRKD("body", classes=4)])
    runs = []
    for restored in (False, True):
        student, teacher = nets(student=4)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
        distilling = options.attach(student, teacher, batch, optimizer)
        values = []
        for step in range(6):
            if restored and step == 3:
                kept = copy.deepcopy(distilling.state_dict())
                distilling.release()
                optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
                distilling = options.attach(student, teacher, batch, optimizer)
                distilling.load_state_dict(kept)
            torch.manual_seed(step)
            loss = distilling.loss(student(batch[0]), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(float(loss.detach()))
        runs.append(values)
    assert runs[0] == runs[1]


def test_a_padded_batch_is_tapped_as_training_sees_it() -> None:
    """In evaluation nn.TransformerEncoder drops padding on the way and hands on nested tensors, unless told not to."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    student, teacher = (nn.TransformerEncoder(copy.deepcopy(layer), 2) for _ in range(2))
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch, src_key_padding_mask=padding)

    distilling = Distill(Features("layers.0", axis=-1)).attach(student, teacher, x, forward=forward)
    fast = torch.backends.mha.get_fastpath_enabled()
    found = distilling.loss(forward(student, x), x)
    assert fast is torch.backends.mha.get_fastpath_enabled() is True
    taken = []
    for model in (student, teacher):
        handle = model.layers[0].register_forward_hook(lambda module, args, out: taken.append(out))
        forward(model.train(), x)
        handle.remove()
    torch.testing.assert_close(found, F.mse_loss(*taken))


def test_a_compiled_student_is_tapped_inside() -> None:
    student, teacher = nets()
    batch = batch_of()
    student.eval()
    plain = Distill([KL(), Features("body")]).attach(student, teacher, batch)
    wanted = plain.loss(student(batch[0]), batch).detach()
    plain.release()
    compiled = torch.compile(student, backend="eager")
    distilling = Distill([KL(), Features("body")]).attach(compiled, teacher, batch)
    for _ in range(2):
        torch.testing.assert_close(distilling.loss(compiled(batch[0]), batch).detach(), wanted)


def test_logits_are_found_by_a_function_where_no_rule_finds_them() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Net()

        def forward(self, x: Tensor) -> Any:
            return torch.ones(()), self.inner(x)

    torch.manual_seed(0)
    student, teacher, batch = Pair().eval(), Pair().eval(), batch_of()
    with pytest.raises(OptionError, match="outputs=lambda"):
        Distill(KL()).attach(student, teacher, batch)
    by_function = Distill(KL(), outputs=lambda out: out[1]).attach(student, teacher, batch)
    by_layer = Distill(KL(layers="inner.head")).attach(student, teacher, batch)
    by_item = Distill(KL(layers="inner")).attach(student, teacher, batch)
    outputs = student(batch[0])
    values = [float(d.loss(outputs, batch).detach()) for d in (by_function, by_layer, by_item)]
    assert values[0] == pytest.approx(
        formulas.kl(outputs[1].detach().numpy(), teacher(batch[0])[1].detach().numpy(), 4.0, 1), rel=1e-4
    )
    assert values[1:] == [values[0]] * 2
    with pytest.raises(OptionError, match="outputs= gave tuple"):
        Distill(KL(), outputs=lambda out: out).attach(student, teacher, batch)


def test_hugging_face_models_are_distilled_as_they_are() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 20,
        "max_position_embeddings": 16,
        "num_labels": 3,
    }
    torch.manual_seed(0)
    models = []
    for heads in (2, 4):
        config = transformers.BertConfig(num_hidden_layers=2, num_attention_heads=heads, **sizes)
        config._attn_implementation = "eager"
        models.append(transformers.BertForSequenceClassification(config).double())
    student, teacher = models
    batch = {"input_ids": torch.randint(0, 40, (3, 7)), "labels": torch.tensor([0, 1, 2])}
    batch["attention_mask"] = torch.ones(3, 7).long()
    batch["attention_mask"][0, 4:] = 0
    layers = "bert.encoder.layer.*.attention.self"
    losses = [KL(), Features("bert.encoder.layer.?", axis=-1), Attention(layers, kind="rows")]
    distilling = Distill(losses).attach(student, teacher, batch)
    student.eval()
    outputs = student(**batch, output_attentions=True)
    found = distilling.loss(outputs, batch)
    found.backward()
    with torch.no_grad():
        taught = teacher(**batch, output_attentions=True)
    wanted = formulas.kl(outputs.logits.detach().numpy(), taught.logits.numpy(), 4.0, 1)
    assert float(distilling.values["KL"]) == pytest.approx(wanted, rel=1e-8)
    rows = [
        formulas.attention_rows(s.mean(1, keepdim=True).expand_as(t).detach().numpy(), t.numpy())
        for s, t in zip(outputs.attentions, taught.attentions, strict=True)
    ]  # the student's heads begin as equal shares
    assert float(distilling.values["Attention"]) == pytest.approx(sum(rows) / 2, rel=1e-8)
    assert student.bert.encoder.layer[0].attention.self.query.weight.grad.abs().sum() > 0
