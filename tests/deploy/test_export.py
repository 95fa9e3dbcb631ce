# SPDX-License-Identifier: Apache-2.0
"""Oracles: PyTorch against ONNX Runtime and OpenVINO called here by hand, the ONNX checker, and the file's own bytes."""

import inspect
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from featherweight.deploy import export, export_onnx, other_sizes, session
from featherweight.errors import ArtefactError, DataError, ExportError, MissingExtra, OptionError, ParityError
from featherweight.task import Task
from tests.deploy.zoo import Convs, FromDict, Recurrent, models

MODELS = models()
# Named after the arguments, and after the places in the output.
NAMES = {
    "several": (("x", "y", "keep"), ("logits", "parts_0", "best")),
    "from dict": (("batch_ids", "batch_kinds", "batch_mask"), ("output",)),
    "attention": (("x",), ("output_0", "output_1")),
    "any": (("inputs_0", "inputs_1"), ("output",)),
}


def run_by_hand(path: Path, arrays: list[Tensor]) -> list[np.ndarray]:
    runtime = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in runtime.get_inputs()]
    return runtime.run(None, dict(zip(names, (a.numpy() for a in arrays), strict=True)))


def tensors(value) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def weights_of(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(str(path)).graph.initializer}


@pytest.mark.parametrize("name", MODELS)
def test_a_file_answers_as_the_model_does_with_any_batch_in_every_runtime(name: str, tmp_path, capfd) -> None:
    model, inputs = MODELS[name]
    model.train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    made = export_onnx(model, inputs, tmp_path / "sub" / "model.onnx")

    assert model.training and all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert capfd.readouterr() == ("", "")
    assert made.dynamic_batch and made.notes == () and made.exporter == "torch.export" and made.opset == 18
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["model.onnx"]
    assert (made.files, made.bytes) == ((made.path,), made.path.stat().st_size)
    onnx.checker.check_model(str(made.path), full_check=True)
    if name in NAMES:
        assert (made.input_names, made.output_names) == NAMES[name]
    content = made.path.read_bytes()  # neither the model's source nor this machine's paths
    assert not any(trace in content for trace in (b"zoo.py", b"site-packages", b"in forward", sys.prefix.encode()))

    model.eval()
    for rows in (1, 2, 5):
        batch = tree_map_only(Tensor, lambda t: t[torch.arange(rows) % len(t)], inputs)  # noqa: B023
        with torch.no_grad():
            expected = tensors(model(*batch))
        names = [value.name for value in onnx.load(str(made.path)).graph.input]
        assert names == list(made.input_names)
        order = {re.sub(r"\W", "_", key): value for key, value in batch[0].items()} if name == "from dict" else {}
        arrays = [order[n.removeprefix("batch_")] for n in names] if order else tensors(batch)
        for runtime in ("onnxruntime", "openvino"):
            got = tensors(session(made.path, runtime, threads=1)(*batch))
            assert [tuple(t.shape) for t in got] == [tuple(t.shape) for t in expected]
            for mine, want in zip(got, expected, strict=True):
                torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-5)
        for by_hand, want in zip(run_by_hand(made.path, arrays), expected, strict=True):
            np.testing.assert_allclose(by_hand, want.numpy(), rtol=1e-4, atol=1e-5)


def test_pruned_zeros_stay_zeros(tmp_path) -> None:
    """Also where a norm is folded into the conv before it, and where gates are put in another order."""
    torch.manual_seed(0)
    convs, lstm = Convs(), Recurrent(nn.LSTM(6, 8, batch_first=True))
    convs.norm.running_mean.normal_()
    pruned = {}
    for model in (convs, lstm):
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                mask = torch.rand_like(weight) < 0.9
                weight.data[mask] = 0.0
                pruned[f"lstm {name}" if model is lstm else name] = mask
    made = export_onnx(convs, MODELS["convs"][1], tmp_path / "convs.onnx")
    for name in ("stem.weight", "depthwise.weight", "grouped.weight", "transposed.weight", "head.weight"):
        assert np.array_equal(weights_of(made.path)[name] == 0, pruned[name].numpy()), name
    made = export_onnx(lstm, MODELS["lstm"][1], tmp_path / "lstm.onnx")
    # ONNX has the gates as i, o, f, c where torch has i, f, c, o.
    shapes = {array.shape: array for array in weights_of(made.path).values()}
    for name, shape in (("lstm layer.weight_ih_l0", (1, 32, 6)), ("lstm layer.weight_hh_l0", (1, 32, 8))):
        i, f, c, o = pruned[name].chunk(4)
        assert np.array_equal(shapes[shape][0] == 0, torch.cat([i, o, f, c]).numpy()), name


class SetsItsBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(2, 4))


class DependsOnItsBatch(SetsItsBatch):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.shape[0] < 3 else -self.layer(x)


@pytest.mark.parametrize(
    ("model", "note"),
    [
        (SetsItsBatch(), "code sets axis 0 of its input ['x'] to 2"),
        (DependsOnItsBatch(), "with a dynamic batch was not kept: largest difference"),
    ],
)
def test_a_model_that_fixes_its_batch_is_exported_with_the_examples_and_a_note(model, note: str, tmp_path) -> None:
    x = torch.randn(2, 4)
    made = export_onnx(model, (x,), tmp_path / "model.onnx")
    assert not made.dynamic_batch
    assert note in " ".join(made.notes)
    [answer] = run_by_hand(made.path, [x])
    np.testing.assert_allclose(answer, model(x).detach().numpy(), rtol=1e-5)
    with pytest.raises(DataError, match=r"model.onnx in ONNX Runtime: .*(Got: 3|invalid dimensions)"):
        session(made.path)(torch.randn(3, 4))


def test_an_input_whose_axis_0_is_not_the_batch_keeps_it(tmp_path) -> None:
    class Table(SetsItsBatch):
        def forward(self, x: Tensor, table: Tensor, gain: Tensor) -> Tensor:
            return self.layer(x) @ table * gain

    table, gain = torch.randn(3, 3), torch.tensor(2.0)
    made = export_onnx(Table(), (torch.randn(2, 4), table, gain), tmp_path / "model.onnx")
    assert made.dynamic_batch
    assert made.notes == ("Input table keeps its axis 0 of 3: the batch of the example is 2.",)
    dims = [
        [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in onnx.load(made.path).graph.input
    ]
    assert dims == [["batch", 4], [3, 3], []]


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_an_lstm_with_projections_is_written_as_plain_ops(tmp_path, capfd) -> None:
    """torch 2.13 exports it to a node that ONNX Runtime refuses to run, and logs."""
    model, x = nn.LSTM(6, 8, proj_size=3, batch_first=True), torch.randn(2, 2, 6)
    made = export_onnx(model, (x,), tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")
    assert made.exporter == "torch.export, decomposed"
    assert "length of sequences is fixed" in made.notes[-1]
    larger = torch.randn(3, 2, 6)
    for got, want in zip(run_by_hand(made.path, [larger]), tensors(model(larger)), strict=True):
        np.testing.assert_allclose(got, want.detach().numpy(), rtol=1e-4, atol=1e-6)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.layer(x)
        return -self.layer(x)


class Unexportable(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.gammaln(self.layer(x))


class Draws(Branches):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.rand_like(x[:, :3])


def line_of(function, code: str) -> int:
    lines, first = inspect.getsourcelines(function)
    return first + next(i for i, line in enumerate(lines) if code in line)


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (
            Branches(),
            ExportError,
            rf'test_export.py:{line_of(Branches.forward, "x.sum")} in forward, "if x.sum\(\) > 0:": .* torch.where',
        ),
        (Unexportable(), ExportError, r"No ONNX function found .*lgamma.* replace it by ops that have one"),
        (Draws(), ParityError, r"answers as the model does: largest difference .* random numbers"),
    ],
)
def test_what_cannot_be_exported_says_where_and_leaves_nothing(model, error, words: str, tmp_path, capfd) -> None:
    with pytest.raises(error, match=re.compile(words, re.DOTALL)) as caught:
        export_onnx(model, (torch.randn(2, 4),), tmp_path / "model.onnx")
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_a_file_that_was_there_survives_a_failed_export(tmp_path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("an earlier export")
    with pytest.raises(ExportError):
        export_onnx(Branches(), (torch.randn(2, 4),), path)
    assert path.read_text() == "an earlier export"


def test_a_folder_that_cannot_be_written_is_named(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match=r"file/model.onnx could not be written: .*Nothing was left behind"):
        export_onnx(nn.Linear(4, 3), (torch.randn(2, 4),), tmp_path / "file" / "model.onnx")
    with pytest.raises(ArtefactError, match="could not be written"):
        export_onnx(nn.Linear(4, 3), (torch.randn(2, 4),), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_weights_too_large_for_one_file_lie_beside_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(export, "_ONE_FILE_BYTES", 100)
    model, x = nn.Linear(40, 30), torch.randn(2, 40)
    made = export_onnx(model, (x,), tmp_path / "model.onnx")
    assert [path.name for path in made.files] == ["model.onnx", "model.onnx.data"]
    assert made.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert "deploy 2 files together" in made.notes[-1]
    np.testing.assert_allclose(run_by_hand(made.path, [x])[0], model(x).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_a_later_opset_and_a_fixed_batch_are_written_if_asked_for(tmp_path) -> None:
    made = export_onnx(nn.Linear(4, 3), (torch.randn(2, 4),), tmp_path / "model.onnx", opset=20, dynamic_batch=False)
    assert (made.dynamic_batch, made.notes) == (False, ())
    assert made.opset == 20 == onnx.load(str(made.path)).opset_import[0].version


@pytest.mark.parametrize(
    ("inputs", "options", "error", "words"),
    [
        ((torch.zeros(2, 4),), {"opset": 17}, OptionError, "opset=17"),
        (torch.zeros(2, 4), {}, OptionError, "for one tensor"),
        ((torch.zeros(2, 5),), {}, DataError, r"Linear could not be called with .*Tensor\[2, 5\]"),
    ],
)
def test_calls_that_cannot_be_meant_are_refused(inputs, options: dict, error: type, words: str, tmp_path) -> None:
    with pytest.raises(error, match=words):
        export_onnx(nn.Linear(4, 3), inputs, tmp_path / "model.onnx", **options)


def test_a_missing_package_is_named_with_the_command(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtra, match=r'pip install "featherweight\[onnx\]"'):
        export_onnx(nn.Linear(4, 3), (torch.zeros(2, 4),), tmp_path / "model.onnx")


def test_keys_may_come_in_any_order(tmp_path) -> None:
    """`ids` and `kinds` look alike: in the wrong order the file would answer, and wrongly."""
    model, (batch,) = FromDict(), MODELS["from dict"][1]
    made = export_onnx(model, (batch,), tmp_path / "model.onnx")
    turned = dict(reversed(batch.items()))
    torch.testing.assert_close(session(made.path)(turned), model(batch).detach())


class Reader(nn.Module):
    """A transformer layer over tokens, as often as they are: positions are made of the sequence, attention is masked."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(30, 16), nn.Embedding(64, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        x = self.layer(x, src_key_padding_mask=mask)
        return self.head(x.masked_fill(mask[..., None], 0.0).sum(1))


def words_of(rows: int, length: int) -> tuple[Tensor, Tensor]:
    mask = torch.rand(rows, length) > 0.7
    mask[:, 0] = False
    return torch.randint(30, (rows, length)), mask


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_lengths_that_vary_in_a_tasks_data_may_be_any_in_the_file(runtime: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Reader().eval()
    data = [(*words_of(rows, length), torch.zeros(rows)) for rows, length in ((4, 9), (4, 9), (4, 12), (2, 7))]
    task = Task(model, words_of(4, 9), calibration=data)
    others = other_sizes(model, task)
    assert [tuple(call[0].shape) for call in others] == [(4, 12)]
    made = export_onnx(model, task.example_inputs, tmp_path / "model.onnx", others=others)
    assert made.open_axes == {"ids": (0, 1), "mask": (0, 1)} and made.dynamic_batch and made.notes == ()
    for rows, length in ((1, 5), (4, 9), (3, 40)):
        call = words_of(rows, length)
        torch.testing.assert_close(session(made.path, runtime)(*call), model(*call).detach(), rtol=1e-4, atol=1e-5)
    assert export_onnx(model, task.example_inputs, tmp_path / "fixed.onnx").open_axes == {"ids": (0,), "mask": (0,)}


def test_a_length_that_the_model_fixes_stays_and_a_note_says_so(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) * (1.0 if x.shape[1] == 6 else 2.0)  # the trace goes one way

    x, other = torch.randn(2, 6), torch.randn(2, 8)
    made = export_onnx(Fixed(), (x,), tmp_path / "model.onnx", others=[(other,)])
    assert made.open_axes == {"x": (0,)}
    assert any(note.startswith("torch.export with a dynamic batch and length ") for note in made.notes), made.notes
    with pytest.raises(OptionError, match=r"others has tuple\(Tensor\[2\]"):
        export_onnx(Fixed(), (x,), tmp_path / "model.onnx", others=[(torch.zeros(2),)])


def test_squares_of_several_sizes_leave_height_and_width_open_each_for_itself(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    made = export_onnx(
        model, (torch.randn(2, 1, 8, 8),), tmp_path / "model.onnx", others=[(torch.randn(2, 1, 11, 11),)]
    )
    assert made.open_axes == {"input": (0, 2, 3)}
    wide = torch.randn(3, 1, 6, 14)
    torch.testing.assert_close(session(made.path)(wide), model(wide).detach(), rtol=1e-4, atol=1e-5)
