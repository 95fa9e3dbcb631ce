# SPDX-License-Identifier: Apache-2.0
"""Whole networks, as torch writes them: the engine runs each by itself, and answers as ONNX Runtime does."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from benchmarks.engine.networks import Encoder
from benchmarks.reconstruct.subjects.crepe import Crepe
from torch import Tensor, nn

import featherweight as fw
import featherweight_engine as core
from tests.engine import networks

Call = tuple[Tensor, ...]


def words(batch: int, tokens: int) -> Call:
    generator = torch.Generator().manual_seed(batch)
    ids = torch.randint(1, 100, (batch, tokens), generator=generator)
    kept = torch.randint(tokens // 2, tokens + 1, (batch, 1), generator=generator)
    return ids, (torch.arange(tokens) < kept).long()


def frames(batch: int) -> Call:
    return (torch.randn(batch, 1024, generator=torch.Generator().manual_seed(batch)),)


class Masked(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, ids: Tensor, attended: Tensor) -> Tensor:
        made: Tensor = self.layer(ids, attention_mask=attended)[0]
        return made


def of_transformers(name: str, **sizes: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**sizes, attn_implementation="eager")
    return networks.settled(Masked(getattr(transformers, f"{name}Model")(config)))


SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}

IMAGES: dict[str, Callable[[], networks.Network]] = {
    "resnet": networks.resnet,
    "mobilenet_v2": networks.mobilenet,
    "mobilenet_v3": lambda: networks.efficientnet(nn.Hardswish, nn.Hardsigmoid),
    "efficientnet": networks.efficientnet,
    "efficientnet_lite": lambda: networks.efficientnet(nn.ReLU6, None),
    "yolo_v5_boxes": networks.detector,
    "yolo_v8_boxes": lambda: networks.detector(distances=True),
    "vit": networks.vit,
}
TEXTS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: networks.bert()[0],
    "bert_of_transformers": lambda: of_transformers("Bert", **SMALL),
    "roberta_of_transformers": lambda: of_transformers("Roberta", **SMALL),
}


def tracing(module: nn.Module, calls: list[Call], path: Path) -> None:
    """torch's older exporter, opset 13, every axis dynamic that the calls differ in."""
    names = [f"input{i}" for i in range(len(calls[0]))]
    axes = {
        name: {
            axis: f"axis{axis}" for axis in range(calls[0][i].dim()) if len({call[i].shape[axis] for call in calls}) > 1
        }
        for i, name in enumerate(names)
    }
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, calls[0], path, dynamo=False, opset_version=13, input_names=names, dynamic_axes=axes)


def dynamo(opset: int) -> Callable[[nn.Module, list[Call], Path], None]:
    def export(module: nn.Module, calls: list[Call], path: Path) -> None:
        lengths = [call for call in calls if call[0].shape[1:] != calls[0][0].shape[1:]]
        written = fw.export_onnx(module, calls[0], path, others=lengths, opset=opset)
        assert written.dynamic_batch and not written.notes

    return export


def agrees(path: Path, calls: list[Call]) -> None:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    for instruction_set in core.instruction_sets():
        engine = fw.engine.load(path, threads=2, instruction_set=instruction_set)
        for call in calls if instruction_set == core.instruction_sets()[0] else calls[-1:]:
            inputs: dict[str, Any] = {name: each.numpy() for name, each in zip(names, call, strict=True)}
            found = engine.run(inputs)
            for port, expected in zip(session.get_outputs(), session.run(None, inputs), strict=True):
                assert found[port.name].shape == expected.shape
                np.testing.assert_allclose(
                    found[port.name], expected, rtol=0, atol=1e-5 * float(np.abs(expected).max())
                )
        assert engine.whole, engine.describe()


@pytest.mark.parametrize("export", [dynamo(18), tracing], ids=["dynamo", "tracing"])
@pytest.mark.parametrize("name", IMAGES)
def test_networks_for_images_at_any_batch(
    name: str, export: Callable[[nn.Module, list[Call], Path], None], tmp_path: Path
) -> None:
    module, (example,) = IMAGES[name]()
    calls: list[Call] = [(networks.image(batch, example.shape[-1], seed=batch),) for batch in (2, 1, 3)]
    export(module, calls, tmp_path / "model.onnx")
    agrees(tmp_path / "model.onnx", calls)


@pytest.mark.parametrize("export", [dynamo(18), tracing], ids=["dynamo", "tracing"])
@pytest.mark.parametrize("name", TEXTS)
def test_encoders_of_texts_at_any_batch_and_length(
    name: str, export: Callable[[nn.Module, list[Call], Path], None], tmp_path: Path
) -> None:
    calls = [words(2, 24), words(1, 24), words(3, 17)]
    export(TEXTS[name](), calls, tmp_path / "model.onnx")
    agrees(tmp_path / "model.onnx", calls)


def test_attention_in_one_piece(tmp_path: Path) -> None:
    """torch's scaled_dot_product_attention and its own encoder; tracing has no form for them at opset 13."""
    calls: list[Call] = [words(2, 24)[:1], words(1, 24)[:1], words(3, 24)[:1]]
    encoder = networks.settled(Encoder(2, 32, 4, 24, 100))
    dynamo(18)(encoder, calls, tmp_path / "encoder.onnx")
    agrees(tmp_path / "encoder.onnx", calls)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu")
    floats: list[Call] = [(torch.randn(batch, tokens, 32),) for batch, tokens in ((2, 20), (1, 20), (3, 13))]
    dynamo(18)(networks.settled(nn.TransformerEncoder(layer, 2)), floats, tmp_path / "torch.onnx")
    agrees(tmp_path / "torch.onnx", floats)


def test_rotated_causal_attention(tmp_path: Path) -> None:
    calls: list[Call] = [words(2, 24)[:1], words(1, 24)[:1], words(3, 17)[:1]]
    dynamo(18)(networks.rotary()[0], calls, tmp_path / "model.onnx")
    agrees(tmp_path / "model.onnx", calls)


@pytest.mark.parametrize("export", [dynamo(18), tracing], ids=["dynamo", "tracing"])
def test_crepe(export: Callable[[nn.Module, list[Call], Path], None], tmp_path: Path) -> None:
    calls = [frames(2), frames(1), frames(3)]
    export(networks.settled(Crepe(2)), calls, tmp_path / "model.onnx")
    agrees(tmp_path / "model.onnx", calls)


def test_a_later_opset(tmp_path: Path) -> None:
    """Split, Reshape, Resize, ReduceMean and Pad have other forms from opset 18 to 21."""
    calls = [words(2, 24), words(1, 24), words(3, 17)]
    dynamo(21)(networks.bert()[0], calls, tmp_path / "bert.onnx")
    agrees(tmp_path / "bert.onnx", calls)
    images: list[Call] = [(networks.image(batch, 32),) for batch in (2, 1, 3)]
    dynamo(21)(networks.efficientnet()[0], images, tmp_path / "efficientnet.onnx")
    agrees(tmp_path / "efficientnet.onnx", images)
