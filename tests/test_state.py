# SPDX-License-Identifier: Apache-2.0
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from featherweight.errors import ArtefactError
from featherweight.state import load_state, random_state, save_state, set_random_state


def test_an_optimizer_comes_back_as_it_was(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), amsgrad=True)
    layer(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    save_state(tmp_path / "s", optimizer.state_dict())
    again = load_state(tmp_path / "s")
    assert again["param_groups"] == optimizer.state_dict()["param_groups"]
    for key, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(again["state"][key][name], value)


def test_a_tensor_that_occurs_twice_is_one_tensor_again(tmp_path: Path) -> None:
    shared = torch.randn(1000)
    save_state(tmp_path / "s", {"a": shared, "b": [shared]})
    assert (tmp_path / "s").stat().st_size < 1.5 * 4000
    again = load_state(tmp_path / "s")
    assert again["a"] is again["b"][0]


def test_random_generators_go_on_where_they_were(tmp_path: Path) -> None:
    np.random.randn()  # fills the generator's second-normal cache, which is state too
    save_state(tmp_path / "s", random_state())
    first = (random.random(), np.random.randn(), torch.rand(1).item())
    set_random_state(load_state(tmp_path / "s"))
    assert (random.random(), np.random.randn(), torch.rand(1).item()) == first


def test_what_json_cannot_hold_is_refused_and_the_older_file_stays(tmp_path: Path) -> None:
    save_state(tmp_path / "s", {"step": 1})
    with pytest.raises(TypeError, match="not object"):
        save_state(tmp_path / "s", {"step": object()})
    assert load_state(tmp_path / "s") == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_damage_and_foreign_files_are_refused(tmp_path: Path) -> None:
    save_state(tmp_path / "s", {"step": torch.ones(100)})
    data = (tmp_path / "s").read_bytes()
    (tmp_path / "cut").write_bytes(data[:-10])
    save_file({"x": torch.ones(2)}, tmp_path / "foreign", metadata={"a": json.dumps({})})
    for name in ("cut", "foreign", "missing"):
        with pytest.raises(ArtefactError, match=name):
            load_state(tmp_path / name)


def test_an_unwritable_folder_is_an_error_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="nowhere"):
        save_state(tmp_path / "nowhere" / "s", {"step": 1})
