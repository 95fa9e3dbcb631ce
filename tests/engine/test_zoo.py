# SPDX-License-Identifier: Apache-2.0
"""The comparison of the zoo: that it sees what is wrong, and says what is handed over. The zoo itself is `make engine-zoo`."""

import numpy as np
import pytest
from benchmarks.engine import zoo

from featherweight.runtime import Engine
from tests.engine.test_engine import normal, perceptron, recurrent


def test_a_network_is_compared_dense_and_pruned_at_two_batches() -> None:
    facts = zoo.compare(perceptron(zeros=0.0), {"x": normal(3, 64)}, threads=1)
    assert set(facts["differences"]) == {f"{zeros} zeros, batch {batch}" for zeros in ("0%", "80%") for batch in (3, 4)}
    assert facts["whole"] and not facts["handed_over"] and facts["error"] < 1e-5
    split = zoo.compare(recurrent(), {"x": normal(5, 2, 8)}, threads=1)
    assert not split["whole"] and split["handed_over"] == {"the engine has no such op": {"LSTM": 1}}
    told = zoo.page(
        [{"network": "one", **facts}, {"network": "two", **split}, {"network": "x", "failed": "ExportError"}]
    )
    assert "2 networks (1 more do not export): 1 wholly in the engine, 1 split; 2 within 0.0001" in told
    assert "| two | LSTM: the engine has no such op |" in told


def test_a_wrong_answer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Engine.run
    monkeypatch.setattr(Engine, "run", lambda self, inputs: {name: y * 1.001 for name, y in run(self, inputs).items()})
    assert zoo.compare(perceptron(), {"x": normal(3, 64)}, threads=1)["error"] == pytest.approx(1e-3, rel=0.1)
    want = {"y": np.array([1.0, np.nan, 2.0], np.float32)}
    assert zoo._difference({"y": np.array([1.0, 3.0, 2.0], np.float32)}, want) == np.inf
    assert zoo._difference({"y": want["y"][:2]}, want) == np.inf
    assert zoo._difference({"z": want["y"]}, want) == np.inf
    assert zoo._difference({"y": np.array([1, 2])}, {"y": np.array([1, 3])}) == np.inf
    assert zoo._difference(want, want) == 0


def test_pruning_takes_the_smallest_weights_of_layers() -> None:
    made = perceptron(zeros=0.0)
    before = {each.name: zoo.onnx.numpy_helper.to_array(each) for each in made.graph.initializer}
    zoo._prune(made, 0.75)
    for tensor in made.graph.initializer:
        after = zoo.onnx.numpy_helper.to_array(tensor)
        gone = after == 0
        assert gone.mean() == pytest.approx(0.75, abs=0.01)
        assert np.abs(before[tensor.name][gone]).max() <= np.abs(after[~gone]).min()
