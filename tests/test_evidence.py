# SPDX-License-Identifier: Apache-2.0
"""What a report is told of layers' widths, set beside the sizes that the modules themselves have before and after."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import featherweight as fw
from featherweight.plan import Swap

from .models import MODELS


def widths(model: nn.Module, inputs: tuple[Any, ...], methods: list[Any]) -> tuple[dict[str, Any], nn.Module]:
    """The report's rows by layer, and the compressed model."""
    result = fw.compress(fw.Task(model, inputs), methods, progress=False)
    return {row["layer"]: row for row in result.report["channels"]}, result.model


class Backwards(nn.Module):
    """Its layers run in another order than they are defined in."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 3)
        self.up = nn.ConvTranspose1d(16, 12, 2, groups=2)
        self.conv = nn.Conv1d(4, 16, 1)
        self.unused = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.up(torch.relu(self.conv(x)))).mean(-1))


def test_layers_stand_in_the_order_in_which_they_run_with_the_widths_that_modules_have() -> None:
    rows, model = widths(
        Backwards(), (torch.randn(2, 4, 6),), [fw.PruneChannels({"parameters": "50 %"}, importance="magnitude")]
    )
    assert list(rows) == ["conv", "up", "head", "unused"]
    assert [row["before"] for row in rows.values()] == [16, 12, 3, 5]
    after = {"conv": model.conv.out_channels, "up": model.up.out_channels, "head": 3, "unused": 5}
    assert {name: row["after"] for name, row in rows.items()} == after
    assert after["conv"] < 16 and after["up"] < 12


def test_heads_of_torchs_attention_are_counted_though_it_was_swapped() -> None:
    make, inputs = MODELS["transformer"]
    trace = fw.trace(make(), inputs(2))
    model = make()
    cut = fw.cut(model, trace["block.self_attn.in_proj_weight"][:1], trace=trace, inputs=inputs(2))
    rows, after = widths(make(), inputs(2), [fw.Apply(cut.plan.edits)])
    assert rows["block.self_attn"] == {
        "layer": "block.self_attn",
        "before": 8,
        "after": 4,
        "heads": {"before": 2, "after": 1},
    }
    assert after.block.self_attn.q.out_features == 4
    assert "block.self_attn.out_proj" not in rows


def test_a_layer_in_a_block_that_is_gone_has_none_and_a_factored_one_its_own() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Linear(6, 4))
    rows, _ = widths(model, (torch.randn(2, 6),), [fw.Apply((Swap("1", to="skip"), fw.Factor("0", rank=2)))])
    assert {name: (row["before"], row["after"]) for name, row in rows.items()} == {
        "0": (6, 6),
        "1.0": (6, 0),
        "2": (4, 4),
    }


def test_heads_are_told_by_the_method_that_cut_them() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(12, 12) for _ in range(4))
            self.head = nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (part(x).unflatten(-1, (-1, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.head(self.out(mixed.transpose(1, 2).flatten(2)).mean(1))

    method = fw.PruneChannels({"macs": "70 %"}, importance="magnitude", layers=["q.*"])
    rows, model = widths(Attention(), (torch.randn(2, 5, 12),), [method])
    assert rows["q"]["heads"] == {"before": 3, "after": model.q.out_features // 4} and model.q.out_features < 12
    assert rows["out"]["heads"] is None


def test_zeros_make_no_layer_narrower() -> None:
    make, inputs = MODELS["mlp"]
    rows, _ = widths(make(), inputs(2), [fw.Prune(sparsity=0.5)])
    assert rows == {}


def test_notes_on_integers_reach_the_reports_warnings_and_calibration_reaches_the_export(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(1), nn.Linear(4 * 16, 3))
    x = torch.randn(4, 3, 8, 8)
    task = fw.Task(model, (x,), calibration=[(x, torch.zeros(4))])
    method = fw.Quantize(8, activations="static", activation_symmetric=True)
    report = fw.compress(task, [method], tmp_path / "run", progress=False).report
    assert report["export"]["integers"]["edges"] > 0 and report["export"]["parity"]["steps"] < 1
    assert any(text.startswith("model.onnx: ") and "activation_symmetric=False" in text for text in report["warnings"])
