# SPDX-License-Identifier: Apache-2.0
"""All corrections together, on every kind of model: what helps held-out samples stays, all else is undone."""

import copy
import itertools
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featherweight.correct import (
    CORRECTIONS,
    Correction,
    correct,
    correct_bias,
    keep_if_better,
    output_error,
    reestimate_batch_norm,
)
from featherweight.correct.keep import Moved
from featherweight.errors import DataError, NumericalError, OptionError
from featherweight.layers import tensors_and_ties
from tests.correct.surroundings import Stopped, bits, call, hooks, pruned, same, stopping, zeros_of
from tests.models import MODELS


@pytest.mark.parametrize("kind", MODELS)
def test_held_out_error_falls_and_zeros_ties_and_modes_stand(kind: str) -> None:
    torch.manual_seed(0)
    make, inputs = MODELS[kind]
    reference = make()
    model = pruned(reference)
    fit, held_out = [inputs(16) for _ in range(4)], [inputs(32), inputs(5)]
    zeros, ties, dense = zeros_of(model), tensors_and_ties(model)[1], bits(reference)
    start = output_error(model, reference, held_out, call)
    done = correct(model, reference, fit, held_out, call, epochs=3)
    assert [one.name for one in done] == list(CORRECTIONS)
    assert done[0].before == start
    for one, after in itertools.pairwise(done):
        assert after.before == one.error <= one.before
    assert all(one.kept == (one.after < one.before) for one in done)
    assert output_error(model, reference, held_out, call) == done[-1].error < start
    assert all(bool((model.get_parameter(name)[zero] == 0).all()) for name, zero in zeros.items())
    assert tensors_and_ties(model)[1] == ties
    assert same(dense, bits(reference))
    assert model.training and reference.training
    assert hooks(model) + hooks(reference) == 0


def test_what_does_not_help_is_undone_to_the_last_bit() -> None:
    """The reference's own statistics were never those of its data, so that true ones lead away from it."""
    torch.manual_seed(0)
    make, inputs = MODELS["residual"]
    reference = make()
    model = pruned(reference, 0.1)
    before = bits(model)
    [one] = correct(model, reference, [inputs(16)], [inputs(16)], call, steps=["batch_norm"])
    assert not one.kept and one.after > one.before
    assert same(before, bits(model))


@pytest.mark.parametrize("step", ["batch_norm", "moments"])
def test_statistics_are_kept_where_they_help(step: str) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for width in (3, 8, 8):
        layers += [nn.Conv2d(width, 8, 3), nn.ReLU(), nn.BatchNorm2d(8)]
    reference = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 4))
    batches = [torch.randn(32, 3, 8, 8) + 1 for _ in range(3)]
    reestimate_batch_norm(reference, batches, call)
    model = pruned(reference, 0.2)
    with torch.no_grad():
        for conv in (model[0], model[3], model[6]):
            conv.weight *= 0.5
            conv.bias *= 0.5
    [one] = correct(model, reference, batches[:2], batches[2:], call, steps=[step])
    assert one.kept and one.after < 0.2 * one.before


def test_norms_are_corrected_again_with_the_biases_where_that_is_better() -> None:
    torch.manual_seed(0)
    make, inputs = MODELS["transformer"]
    reference = make()
    model = pruned(reference)
    other = copy.deepcopy(model)
    fit, held_out = [inputs(16) for _ in range(4)], [inputs(64)]
    correct(model, reference, fit, held_out, call, ["moments"])
    done = correct(other, reference, fit, held_out, call, ["moments", "bias"])
    plain = copy.deepcopy(model)
    correct_bias(plain, reference, fit, call)
    assert done[1].kept and done[1].after < output_error(plain, reference, held_out, call)
    assert not torch.equal(model.block.norm1.weight, other.block.norm1.weight)


@pytest.mark.parametrize("kind", ["residual", "transformer", "recurrent"])
@pytest.mark.parametrize("after", [0, 3, 5, 9, 14, 20, 26, 33, 40])
@pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt()])
def test_a_failure_anywhere_leaves_the_model_as_it_came(kind: str, after: int, error: BaseException) -> None:
    torch.manual_seed(0)
    make, inputs = MODELS[kind]
    reference = make()
    model = pruned(reference)
    before, data, random = bits(model), [inputs(4), inputs(4)], torch.get_rng_state()
    with pytest.raises(type(error)):
        correct(model, reference, data, data, stopping(after, error), epochs=50, patience=50)
    assert same(before, bits(model)) and hooks(model) + hooks(reference) == 0
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(random, torch.get_rng_state())


def test_a_failing_report_undoes_what_was_kept() -> None:
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    model = pruned(reference)
    before, data = bits(model), [torch.randn(30, 4) + 1]

    def report(event: dict[str, Any]) -> None:
        if event["kind"] == "correction" and event["kept"]:
            raise Stopped

    for steps in (["bias"], ["outputs"], ["bias", "outputs"]):
        with pytest.raises(Stopped):
            correct(model, reference, data, data, call, steps, report=report, epochs=3)
        assert same(before, bits(model))


@pytest.mark.parametrize("step", CORRECTIONS)
def test_a_model_with_nothing_to_correct_is_told_so(step: str) -> None:
    """No norm, no bias, and no parameter that may move."""
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(4, 3, bias=False))
    model = pruned(reference)
    data = [torch.randn(8, 4)]
    [one] = correct(model, reference, data, data, call, [step], frozen=["0.weight"])
    assert not one.kept and one.before == one.after > 0
    assert one.note.startswith("nothing ")
    [one] = correct(reference, copy.deepcopy(reference), data, data, call, [step])
    assert one == Correction(step, 0.0, 0.0, False, "nothing to correct: the model answers as the reference does")


def test_bert_with_padding_and_a_frozen_grid() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    reference = transformers.BertModel(config)
    for parameter in reference.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(8)
    model = pruned(reference, 0.6)

    def batches(count: int) -> list[dict[str, Tensor]]:
        found = []
        for _ in range(count):
            lengths = torch.randint(3, 10, (16, 1))
            mask = (torch.arange(9) < lengths).long()
            found.append({"input_ids": torch.randint(0, 50, (16, 9)), "attention_mask": mask})
        return found

    weight = "encoder.layer.0.output.dense.weight"
    grid, zeros = model.get_parameter(weight).detach().clone(), zeros_of(model)
    fit, held_out = batches(6), batches(3)
    done = correct(model, reference, fit, held_out, call, frozen=[weight], epochs=6)
    assert {one.name for one in done if one.kept} >= {"moments", "outputs"}
    assert done[-1].error < 0.8 * done[0].before
    assert torch.equal(grid, model.get_parameter(weight))
    assert all(bool((model.get_parameter(name)[zero] == 0).all()) for name, zero in zeros.items())
    # Whatever stands at padding changes neither the corrections nor their judgement.
    again = pruned(reference, 0.6)
    for batch in fit + held_out:
        batch["input_ids"] = torch.where(batch["attention_mask"] == 0, 7, batch["input_ids"])
    repeated = correct(again, reference, fit, held_out, call, ["moments", "bias"])
    assert [one.after for one in repeated] == pytest.approx([one.after for one in done[1:3]], rel=1e-4)


def test_a_language_model_of_lstms() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.lstm = nn.Embedding(20, 8), nn.LSTM(8, 8, num_layers=2, batch_first=True)
            self.head = nn.Linear(8, 20)
            self.head.weight = self.words.weight

        def forward(self, tokens: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            states, last = self.lstm(self.words(tokens))
            return self.head(states), last

    torch.manual_seed(0)
    reference = Words()
    for parameter in reference.lstm.parameters():
        parameter.data.mul_(3)
    model = pruned(reference, 0.6)
    fit, held_out = ([torch.randint(0, 20, (16, 12)) for _ in range(n)] for n in (4, 2))
    done = correct(model, reference, fit, held_out, call, epochs=5)
    assert done[2].kept and done[3].kept
    assert model.head.weight is model.words.weight


def test_events_say_what_happens_and_can_be_written_down() -> None:
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model = pruned(reference)
    data, events = [torch.randn(30, 4), torch.randn(9, 4)], []
    done = correct(model, reference, data, data, call, report=events.append, epochs=3)
    json.dumps(events, allow_nan=False)
    told = [event for event in events if event["kind"] == "correction"]
    assert [(one["name"], one["before"], one["after"], one["kept"], one["note"]) for one in told] == [
        (one.name, one.before, one.after, one.kept, one.note) for one in done
    ]
    for step in ("moments", "bias", "outputs"):
        steps = [event for event in events if event["kind"] == "progress" and event["correction"] == step]
        assert steps and steps[0]["step"] == 1 and steps[-1]["step"] <= steps[-1]["total"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"steps": ["bais"]}, "Nearest: bias"),
        ({"steps": "bias"}, r'steps=\["bias"\]'),
        ({"frozen": ["wieght"]}, "Nearest names: weight"),
        ({"epochs": 0}, "epochs"),
        ({"match": "output"}, "Nearest: outputs"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(options: dict[str, Any], told: str) -> None:
    model, data = nn.Linear(2, 2), [torch.ones(1, 2)]
    with pytest.raises(OptionError, match=told):
        correct(model, copy.deepcopy(model), data, data, call, **options)


def test_batches_that_can_be_read_once_are_refused() -> None:
    model, data = nn.Linear(2, 2), [torch.ones(1, 2)]
    for fit, held_out in ((iter(data), data), (data, iter(data)), ([], data), (data, [])):
        with pytest.raises(DataError):
            correct(model, copy.deepcopy(model), fit, held_out, call)


@pytest.mark.parametrize("whose", ["the compressed model", "the dense reference"])
def test_answers_that_are_not_numbers_name_the_model(whose: str) -> None:
    fine, broken = nn.Linear(2, 2), nn.Linear(2, 2)
    broken.weight.data[0, 0] = math.nan
    model, reference = (broken, fine) if whose == "the compressed model" else (fine, broken)
    with pytest.raises(NumericalError, match=whose):
        correct(model, reference, [torch.ones(3, 2)], [torch.ones(3, 2)], call)


def test_an_attempt_that_gives_nan_is_undone_and_told() -> None:
    weight = torch.tensor([1.0, -0.0])
    before = weight.clone()

    def ruin() -> Moved:
        weight.fill_(math.nan)
        return Moved(("weight",))

    def error() -> float:
        if bool(weight.isnan().any()):
            raise NumericalError("the answer holds NaN")
        return 1.0

    one = keep_if_better("ruin", ruin, [weight], error, before=2.0)
    assert not one.kept and one.after == math.inf and one.error == 2.0 and "NaN" in one.note
    assert torch.equal(weight.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize("error", [RuntimeError(), Stopped()])
def test_an_attempt_that_fails_or_gains_nothing_is_undone(error: BaseException) -> None:
    weight = torch.tensor([1.0])

    def move(raised: BaseException | None = None) -> Moved:
        weight.add_(1.0)
        if raised is not None:
            raise raised
        return Moved(("weight",))

    with pytest.raises(type(error)):
        keep_if_better("move", lambda: move(error), [weight], lambda: 0.0, before=1.0)
    assert weight == 1.0
    assert not keep_if_better("move", move, [weight], lambda: 1.0, before=1.0).kept
    assert weight == 1.0


def test_half_precision_is_corrected_in_its_own_dtype() -> None:
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)).to(torch.bfloat16)
    model = pruned(reference.float(), 0.6).to(torch.bfloat16)
    reference = reference.to(torch.bfloat16)
    data = [torch.randn(64, 8, dtype=torch.bfloat16) + 1]
    done = correct(model, reference, data, data, call, epochs=3)
    assert done[-1].error < done[0].before
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
