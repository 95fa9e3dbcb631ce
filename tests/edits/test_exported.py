# SPDX-License-Identifier: Apache-2.0
"""Cuts on the exported program: patterns whose code fixes its sizes, against the uncut model with absent channels."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from featherweight.edits import cut, cut_exported
from featherweight.errors import EditError, FeatherweightError, GraphError, VerifyError
from featherweight.graph import Program, rewrite, trace
from tests.graph.absent import without
from tests.graph.pattern import leaves
from tests.graph.patterns import build

FIXED = ("attn_heads_fixed", "view_static", "split_slice", "gather_roll", "attn_width_of_the_input", "gru_cell")
OTHERS = (
    "channel_shuffle",
    "grouped_conv_expand",
    "depthwise",
    "swin_shift",
    "rotary",
    "lstm",
    "encoder_layer",
    "groupnorm",
)


@pytest.mark.parametrize("name", FIXED + OTHERS)
def test_a_program_answers_as_the_uncut_model_with_absent_channels(name):
    model, inputs = build(name)
    found = trace(model, inputs)
    for group in found.groups:
        done = cut_exported(model, group[: max(1, group.size // 3)], inputs, trace=found)
        assert done.kept[group.name] == group.size - max(1, group.size // 3)
        makers = [
            (m.tensor, m.axis, m.positions[: max(1, group.size // 3)].ravel().tolist())
            for m in group.members
            if m.role != "input"
        ]
        wanted = without(*build(name), makers)
        for got, expected in zip(leaves(done.program(*inputs)), wanted, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        sizes = {n: tuple(t.shape) for n, t in done.program.state_dict().items()}
        for member in group.members:
            lost = member.positions[: max(1, group.size // 3)].size
            assert sizes[member.tensor][member.axis] == found.shapes[member.tensor][member.axis] - lost


def test_what_an_eager_cut_refuses_is_cut_in_the_program_and_the_model_stays():
    model, inputs = build("view_static")
    found = trace(model, inputs)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    couplings = found.groups[0][:1]
    with pytest.raises(FeatherweightError):
        cut(model, couplings, trace=found, inputs=inputs)
    done = cut_exported(model, couplings, inputs, trace=found)
    assert done.verified.error < 1e-9
    assert sum(p.numel() for p in done.program.parameters()) == found.parameters(
        {found.groups[0].name: found.groups[0].size - 1}
    )
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm])
def test_computed_weights_are_proved_as_the_program_rounds_them(norm):
    """In float32 and train mode, as models come: a program holds the product, not the parts that it is computed from."""
    torch.manual_seed(0)

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.middle, self.last = nn.Linear(3, 12), norm(nn.Linear(12, 12)), nn.Linear(12, 2)

        def forward(self, x):
            hidden = self.middle(self.first(x).tanh())
            return self.last(hidden.view(-1, 12).tanh())

    model, inputs = Fixed(), (torch.randn(5, 3),)
    found = trace(model, inputs)
    answer = copy.deepcopy(model).eval()(*inputs)
    for group in found.groups:
        done = cut_exported(model, group[:4], inputs, trace=found)
        assert done.verified.error < 1e-9
        assert sum(p.numel() for p in done.program.parameters()) < found.parameters()
    torch.testing.assert_close(copy.deepcopy(model).eval()(*inputs), answer)


def test_a_wrong_size_in_the_program_is_found_by_the_proof(monkeypatch):
    model, inputs = build("chain_flatten")
    found = trace(model, inputs)
    group = found.groups[0]

    def wrong(model, inputs, removed, **options):
        shifted = {name: (indices + 1) % found[name].size for name, indices in removed.items()}
        return rewrite(model, inputs, shifted, **options)

    monkeypatch.setattr("featherweight.edits.exported.rewrite", wrong)
    with pytest.raises(VerifyError):
        cut_exported(model, group[:1], inputs, trace=found)


def test_onnx_runtime_runs_the_program(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    from featherweight.deploy import export_onnx

    model, inputs = build("attn_heads_fixed")
    model, inputs = model.float(), tuple(x.float() for x in inputs)
    found = trace(model, inputs)
    group = next(g for g in found.groups if g.kind == "heads")
    done = cut_exported(model, group[:1], inputs, trace=found)
    export_onnx(done.program, inputs, tmp_path / "model.onnx")
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: inputs[0].numpy()}
    np.testing.assert_allclose(session.run(None, feed)[0], leaves(done.program(*inputs))[0].detach().numpy(), atol=1e-5)


def test_a_program_keeps_names_and_can_be_copied():
    model, inputs = build("residual")
    program = rewrite(model, inputs, {})
    assert isinstance(program, Program)
    assert {n for n, _ in program.named_parameters()} == {n for n, _ in model.named_parameters()}
    twin = copy.deepcopy(program)
    for a, b, c in zip(leaves(program(*inputs)), leaves(twin(*inputs)), leaves(model(*inputs)), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)


def test_refusals_say_what_to_do():
    model, inputs = build("residual")
    found = trace(model, inputs)
    group = found.groups[0]
    with pytest.raises(EditError, match="keep one"):
        cut_exported(model, group[:], inputs, trace=found)
    with pytest.raises(EditError, match="there is no number"):
        cut_exported(model, [type(group[0])(group.name, 99)], inputs, trace=found)
    with pytest.raises(GraphError, match="cannot be exported"):
        rewrite(*build("control_flow"), {})


def test_a_repeat_that_says_its_length_says_the_new_one():
    class Repeats(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(3, 4), torch.nn.Linear(8, 2)

        def forward(self, x):
            return self.b(torch.repeat_interleave(self.a(x), 2, dim=-1, output_size=8))

    model, x = Repeats().double(), (torch.randn(5, 3, dtype=torch.float64),)
    done = cut_exported(model, trace(model, x)["a"][1:2], x)
    kept, columns = [0, 2, 3], [0, 1, 4, 5, 6, 7]
    hidden = (x[0] @ model.a.weight[kept].T + model.a.bias[kept]).repeat_interleave(2, -1)
    torch.testing.assert_close(done.program(*x), hidden @ model.b.weight[:, columns].T + model.b.bias)
