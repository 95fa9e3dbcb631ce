# SPDX-License-Identifier: Apache-2.0
"""Oracle: ONNX files put together by hand that are wrong by a known amount at a known output."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from featherweight.deploy import check_parity, parity, sample_inputs
from featherweight.errors import ParityError


class Pair(nn.Module):
    """Gives its input and twice its input."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, 2 * x


class Shift(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.zeros(3)


class Best(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(1)


def written(path: Path, shape, offsets: dict[str, np.ndarray], kind: int = TensorProto.FLOAT) -> Path:
    """A file with one output for each name: the input plus an offset."""
    nodes = [helper.make_node("Add", ["x", f"offset of {name}"], [name]) for name in offsets]
    constants = [numpy_helper.from_array(np.asarray(v, np.float32), f"offset of {n}") for n, v in offsets.items()]
    outputs = [helper.make_tensor_value_info(name, kind, None) for name in offsets]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    graph = helper.make_graph(nodes, "by hand", inputs, outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(path))
    return path


X = torch.tensor([[1.0, 2.0, 4.0], [8.0, 0.0, 1.0]])


def test_equal_answers_pass_with_their_numbers(tmp_path) -> None:
    result = check_parity(Shift(), written(tmp_path / "m.onnx", [None, 3], {"y": [0, 0, 0]}), [(X,), (2 * X,)])
    assert result.passed and result.n == 2
    assert (result.max_abs_diff, result.max_rel_diff, result.argmax_agreement) == (0.0, 0.0, 1.0)
    assert result.words.endswith("on 2 inputs in onnxruntime (tolerance 1e-04); argmax agrees on 100 %")


@pytest.mark.parametrize(("offset", "passed"), [(8e-4 * 0.9, True), (8e-4 * 1.1, False)])
def test_the_tolerance_is_relative_to_the_outputs_largest_value(offset: float, passed: bool, tmp_path) -> None:
    result = parity(Shift(), written(tmp_path / "m.onnx", [None, 3], {"y": [offset, 0, 0]}), [(X,)])
    assert result.passed is passed
    assert result.max_abs_diff == pytest.approx(offset, rel=1e-3)
    assert result.max_rel_diff == pytest.approx(offset / 8, rel=1e-3)


def test_a_failure_names_the_output_and_the_numbers(tmp_path) -> None:
    class Three(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return x + 0, x + 0, x + 0

    path = written(tmp_path / "m.onnx", [None, 3], {"a": [0, 0, 0], "b": [0, 0, 2], "c": [0, 0, 0]})
    with pytest.raises(ParityError, match=r"m.onnx does not answer .* 2, 0.25 of the largest value at output b, on 1"):
        check_parity(Three(), path, [(X,)])


def test_argmax_agreement_is_the_share_of_predictions(tmp_path) -> None:
    result = parity(Shift(), written(tmp_path / "m.onnx", [None, 3], {"y": [3.5, 0, 0]}), [(X,)])
    assert result.argmax_agreement == 0.5  # the first row's largest becomes entry 0, the second row's is it already
    maps = torch.stack([X, X.flip(0)], 1)[..., None]  # (2, 2 classes, 3, 1): classes on axis 1
    result = parity(Shift(), written(tmp_path / "m.onnx", [None, 2, 3, 1], {"y": np.zeros((2, 1, 1))}), [(maps[:0],)])
    assert result.argmax_agreement is None
    tie = torch.tensor([[1.0, 1.0 + 1e-6, 0.0]])
    result = parity(Shift(), written(tmp_path / "m.onnx", [None, 3], {"y": [2e-6, 0, 0]}), [(tie,)])
    assert result.argmax_agreement == 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_on_one_side_fails(value: float, tmp_path) -> None:
    path = written(tmp_path / "m.onnx", [None, 3], {"y": [0, value, 0]})
    result = parity(Shift(), path, [(X,)])
    assert not result.passed
    json.dumps(result.to_dict(), allow_nan=False)
    bad = X.clone()
    bad[0, 1] = value
    path = written(tmp_path / "m.onnx", [None, 3], {"y": [0, 0, 0]})
    assert parity(Shift(), path, [(bad,)]).passed is (value == float("inf"))  # the same infinity is no difference
    path = written(tmp_path / "m.onnx", [None, 3], {"y": [0, 0, 1]})
    assert not parity(Shift(), path, [(bad,)]).passed  # nor does it hide one


def test_other_shapes_numbers_of_outputs_and_runtime_failures_are_answers_too(tmp_path) -> None:
    path = written(tmp_path / "m.onnx", [None, 3], {"y": np.zeros((2, 1, 3))})
    assert (
        parity(Shift(), path, [(X,)]).words == "input 0: output y has shape [2, 2, 3] in the file, [2, 3] in the model"
    )
    path = written(tmp_path / "m.onnx", [None, 3], {"y": [0, 0, 0]})
    assert parity(Pair(), path, [(X,)]).words == "the model has 2 outputs, the file 1"
    assert "m.onnx in ONNX Runtime" in parity(nn.Identity(), path, [(X[:, :2],)]).words
    assert "could not be called" in parity(Shift(), path, [(X[:, :2],)]).words
    assert "is not there" in parity(Shift(), tmp_path / "none.onnx", [(X,)]).words
    path.write_bytes(b"no protobuf")
    result = parity(Shift(), path, [(X,)])
    assert (result.passed, result.n) == (False, 0)
    assert "refuses it" in result.words


def test_integers_must_be_equal(tmp_path) -> None:
    node = helper.make_node("ArgMin", ["x"], ["y"], axis=1, keepdims=0)
    graph = helper.make_graph(
        [node], "by hand", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 3])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, [None])],
    )  # fmt: skip
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(path))
    assert parity(Best(), path, [(-torch.ones(2, 3),)]).passed
    result = parity(Best(), path, [(X,), (-torch.ones(2, 3),)])
    assert not result.passed
    assert result.words.startswith("output y: 2 of 2 values (torch.int64) differ")


def test_samples_are_like_the_example_and_none_that_the_model_refuses() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 2)

        def forward(self, ids: Tensor, noise: Tensor, flag: str, mask: Tensor) -> Tensor:
            if ids[0, 0] == 4:
                raise ValueError("not this one")
            return self.embedding(ids).sum() + torch.log(noise).sum()

    ids = torch.tensor([[1, 4, 2, 4], [0, 2, 4, 3]])
    inputs = (ids, torch.rand(3) + 1, "flag", torch.zeros(2, 9))
    samples = sample_inputs(Picky(), inputs, count=20)
    assert samples[0] is inputs
    assert 10 < len(samples) < 21
    for drawn_ids, noise, flag, mask in samples[1:]:
        assert set(drawn_ids.flatten().tolist()) <= set(ids.flatten().tolist()) and drawn_ids[0, 0] != 4
        assert torch.isin(noise, inputs[1]).all() and flag == "flag"
        assert mask.shape == (2, 9) and mask.std() > 0.3
    again = sample_inputs(Picky(), inputs, count=20)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(samples, again, strict=True))
