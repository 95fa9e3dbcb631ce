# SPDX-License-Identifier: Apache-2.0
"""Oracle: the PyTorch model, and for threads and telemetry the runtimes' own word."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from featherweight.deploy import RUNTIMES, available_runtimes, export_onnx, session, torch_session
from featherweight.errors import ArtefactError, DataError, OptionError
from featherweight.measure import time_callables
from featherweight.task import Task, default_forward
from tests.deploy.zoo import models


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Float, bool and a constant in; float and int64 out, in a dict with things that are no tensors."""
    model, inputs = models()["several"]
    return model.eval(), inputs, export_onnx(model, inputs, tmp_path_factory.mktemp("several") / "model.onnx").path


@pytest.mark.parametrize("runtime", list(RUNTIMES))
def test_a_session_is_called_as_the_model_is(runtime: str, several) -> None:
    model, inputs, path = several
    opened = session(path, runtime, threads=1)
    assert (opened.name, opened.threads) == (runtime, 1)
    assert (opened.input_names, opened.output_names) == (("x", "y", "keep"), ("logits", "parts_0", "best"))
    expected = model(*inputs)
    expected = (expected["logits"], expected["parts"][0], expected["best"])
    for call in (inputs, tuple(i.numpy() if isinstance(i, Tensor) else i for i in inputs), inputs[:3]):
        answer = opened(*call)
        assert isinstance(answer, tuple)
        for got, want in zip(answer, expected, strict=True):
            assert got.dtype == want.dtype
            torch.testing.assert_close(got, want.detach(), rtol=1e-4, atol=1e-6)
    strided = (torch.randn(4, 3).T, *inputs[1:])
    torch.testing.assert_close(opened(*strided)[0], model(*strided)["logits"].detach(), rtol=1e-4, atol=1e-6)


def test_answers_stay_when_the_session_is_called_again(several) -> None:
    _, inputs, path = several
    for opened in (session(path, runtime) for runtime in RUNTIMES):
        first = opened(*inputs)[0]
        kept = first.clone()
        opened(*(2 * t if t.is_floating_point() else t for t in inputs[:3]))
        assert torch.equal(first, kept)


def test_an_output_of_the_model_gives_the_answers_their_structure(several) -> None:
    model, inputs, path = several
    want = model(*inputs)
    for opened in (session(path, like=want), torch_session(model, like=want)):
        got = opened(*inputs)
        assert list(got) == ["logits", "parts", "best", "count"]
        assert got["parts"][1] is None and got["count"] == 2
        torch.testing.assert_close(got["logits"], want["logits"].detach(), rtol=1e-4, atol=1e-6)


def test_a_torch_session_is_the_model_in_eval_mode_and_leaves_it_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(), nn.BatchNorm1d(3)).train()
    x = torch.randn(5, 4)
    opened = torch_session(model, threads=1)
    answer = opened(x)
    assert model.training and not answer.requires_grad
    assert torch.equal(answer, model.eval()(x))
    assert list(opened.parameters()) == [] and opened.eval() is opened
    with torch.no_grad():
        model[0].weight.zero_()  # what is timed is what is there
    assert torch.equal(opened(x), model(x))
    with pytest.raises(OptionError, match=r"call model.eval\(\) first"):
        torch_session(torch.compile(model.train()))


def test_a_torch_session_keeps_to_its_threads_wherever_it_is_called() -> None:
    seen: list[int] = []

    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.get_num_threads())
            return x

    before = torch.get_num_threads()
    torch_session(Asks(), threads=before + 1)(torch.zeros(1))
    assert seen == [before + 1] and torch.get_num_threads() == before


def test_threads_reach_the_runtimes(several, monkeypatch) -> None:
    import onnxruntime

    session(several[2], "openvino")  # `import openvino` would report: see the last test here
    openvino = sys.modules["openvino"]
    made, settings = [], []
    real, compile_model = onnxruntime.InferenceSession, openvino.Core.compile_model
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: made.append(real(*a, **k)) or made[-1])
    monkeypatch.setattr(
        openvino.Core, "compile_model", lambda self, *a: settings.append(compile_model(self, *a)) or settings[-1]
    )
    for runtime in RUNTIMES:
        assert session(several[2], runtime, threads=1).threads == 1
    options = made[0].get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)
    assert settings[0].get_property("INFERENCE_NUM_THREADS") == 1
    assert settings[0].get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"


def test_all_runtimes_can_be_timed_against_each_other(several) -> None:
    model, inputs, path = several
    opened = {"torch": torch_session(model, 1), **{name: session(path, name, 1) for name in available_runtimes()}}
    assert set(opened) == {"torch", "engine", "onnxruntime", "openvino"}
    candidates = {name: lambda opened=one: opened(*inputs) for name, one in opened.items()}
    assert all(0 < t.median_ms < 100 for t in time_callables(candidates, threads=1, runs=50).values())


def test_wrong_calls_say_what_is_wrong(several, tmp_path, capfd) -> None:
    _, inputs, path = several
    for runtime in RUNTIMES:
        with pytest.raises(DataError, match=r"takes 3 inputs \(x, y, keep\), got tuple\(Tensor\[3, 4\] float32\)"):
            session(path, runtime)(inputs[0])
        with pytest.raises(DataError, match=r"model.onnx (in O\w+|takes x float32)"):
            session(path, runtime)(np.zeros((3, 9), np.float32), *inputs[1:3])
        (tmp_path / "damaged.onnx").write_bytes(path.read_bytes()[:200])
        with pytest.raises(ArtefactError, match=r"damaged.onnx"):
            session(tmp_path / "damaged.onnx", runtime)
        with pytest.raises(ArtefactError, match=r"none.onnx is not there. .*export_onnx"):
            session(tmp_path / "none.onnx", runtime)
    with pytest.raises(OptionError, match=r"runtime 'onnxrt' is none of engine, onnxruntime, openvino"):
        session(path, "onnxrt")
    with pytest.raises(DataError, match="bfloat16"):
        session(path)(inputs[0].bfloat16(), *inputs[1:3])
    assert capfd.readouterr() == ("", "")


class Encoder(nn.Module):
    """Called by keyword, as language models are, with arguments between that a task may leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds, self.head = nn.Embedding(30, 8), nn.Embedding(2, 8), nn.Linear(8, 3)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        flag: bool = False,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        x = self.words(input_ids)
        if token_type_ids is not None:
            x = x + self.kinds(token_type_ids)
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        return self.head(x.sum(1))


def batch_of_words(rows: int) -> dict[str, Tensor]:
    ids = torch.randint(30, (rows, 5))
    return {"token_type_ids": ids % 2, "attention_mask": (ids > 4).long(), "input_ids": ids}


@pytest.mark.parametrize("runtime", ["torch", *RUNTIMES])
def test_a_task_whose_batches_are_dicts_is_scored_in_every_runtime(runtime: str, tmp_path) -> None:
    torch.manual_seed(0)
    model, batches = Encoder().eval(), [batch_of_words(rows) for rows in (4, 2, 7)]
    labels = [model(**batch).argmax(1) for batch in batches]
    labels[0] = (labels[0] + 1) % 3

    def evaluate(scored) -> float:
        right = [default_forward(scored, batch).argmax(1) == want for batch, want in zip(batches, labels, strict=True)]
        return float(torch.cat(right).double().mean())

    example = batch_of_words(3)
    inputs = (example["input_ids"], example["attention_mask"], False, example["token_type_ids"])
    task = Task(model, inputs, calibration=batches, evaluate=evaluate)
    made = export_onnx(model, inputs, tmp_path / "model.onnx")
    assert made.input_names == ("input_ids", "attention_mask", "token_type_ids")
    opened = torch_session(model) if runtime == "torch" else session(made.path, runtime)
    assert task.evaluate is not None and task.evaluate(opened) == task.evaluate(model) == pytest.approx(9 / 13)
    torch.testing.assert_close(
        opened(example["input_ids"], flag=False, **{k: v.numpy() if runtime != "torch" else v for k, v in example.items() if k != "input_ids"}),
        model(**example).detach(),
    )  # fmt: skip


@pytest.mark.parametrize("runtime", list(RUNTIMES))
def test_names_that_a_file_has_not_or_lacks_are_told(runtime: str, several) -> None:
    _, inputs, path = several
    opened = session(path, runtime)
    with pytest.raises(
        DataError, match=r"takes 3 inputs \(x, y, keep\), and 'keeps' is none of them. Nearest: .'keep'"
    ):
        opened(inputs[0], y=inputs[1], keeps=inputs[2])
    with pytest.raises(
        DataError, match=r"takes 3 inputs \(x, y, keep\), and y, keep is missing: got tuple\(\) and dict\(x="
    ):
        opened(x=inputs[0])
    with pytest.raises(DataError, match="'x' is given by place and by name"):
        opened(*inputs[:2], x=inputs[0], keep=inputs[2])


def test_no_runtime_opens_a_connection_or_loads_telemetry(several, tmp_path) -> None:
    """`import openvino` by itself does both, from a thread."""
    program = f"""
import os, socket, sys, time
def refuse(*args, **kwargs):
    print("a connection was opened", flush=True)
    os._exit(1)
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import torch
from featherweight.deploy import session
for runtime in ("engine", "onnxruntime", "openvino"):
    session({str(several[2])!r}, runtime)(torch.zeros(3, 4), torch.zeros(3, 5), torch.ones(3, dtype=torch.bool))
time.sleep(0.5)
print("openvino_telemetry" in sys.modules)
"""
    # Where a variable says CI, or the home folder that the user has opted out, this would show nothing.
    hidden = ("CI", "TF_BUILD", "JENKINS_URL")
    environment = {key: value for key, value in os.environ.items() if key not in hidden} | {"HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_a_signal_after_openvino_is_no_crash(several) -> None:
    """Each core sets a stack for signals and puts back the one before, which may be gone: Ctrl-C was a segmentation fault."""
    program = f"""
import gc, signal, time
from featherweight.deploy import session
from featherweight.doctor import diagnose
diagnose()
one, other = (session({str(several[2])!r}, "openvino") for _ in range(2))
del one
gc.collect()
del other
gc.collect()
rung = []
signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
signal.setitimer(signal.ITIMER_REAL, 0.05)
time.sleep(0.2)
print(rung)
"""
    command = [sys.executable, "-X", "faulthandler", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[1]\n"), done.stderr
