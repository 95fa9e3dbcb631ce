# SPDX-License-Identifier: Apache-2.0
"""Sizes: by the page's formulas, by closed forms for random zeros, and by brute force over the choices."""

import math
import os
from collections import Counter
from itertools import groupby
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from featherweight.pack import code, load_file, save_file
from featherweight.pack.codecs import CODECS
from featherweight.pack.source import look
from tests.pack.samples import FLOATS, only, random_tensor

ROWS, COLUMNS = 200, 1000
N = ROWS * COLUMNS


def pruned(sparsity: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Exactly round(sparsity * N) zeros, at random places; nothing in it fits into fp16 or bf16."""
    generator = torch.Generator().manual_seed(round(sparsity * 1000))
    weight = torch.randn(N, generator=generator).abs() + 0.01
    weight[torch.randperm(N, generator=generator)[: round(sparsity * N)]] = 0
    return weight.to(dtype).reshape(ROWS, COLUMNS)


def csr_bytes(tensor: torch.Tensor, width: int) -> dict[str, int]:
    """The size for each number of bits; empty runs need no filler and are left out."""
    runs = Counter(len(list(run)) for zero, run in groupby((tensor.reshape(-1) == 0).tolist()) if zero)
    sizes = {}
    for bits in range(1, 17):
        entries = int((tensor != 0).sum()) + sum(count * (run // 2**bits) for run, count in runs.items())
        sizes[f"csr:{bits}"] = math.ceil(entries * bits / 8) + entries * width
    return sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sparsity", [0.0, 0.02, 0.3, 0.5, 0.75, 0.85, 0.9, 0.95, 0.99, 0.9999, 1.0])
@only(*FLOATS)
def test_the_smallest_of_all_forms_is_taken_and_has_the_size_of_its_formula(
    tmp_path: Path, sparsity: float, dtype: torch.dtype
) -> None:
    tensor, width = pruned(sparsity, dtype), dtype.itemsize
    if sparsity == 1 and dtype == torch.float32:
        width = 2  # zeros alone are fp16 values as well
    nonzeros = int((tensor != 0).sum())
    sizes = csr_bytes(tensor, width) | {"bitmask": math.ceil(N / 8) + nonzeros * width, "dense": N * width}
    coded = save_file(tmp_path / "f", {"w": tensor})["w"]
    assert coded.coded_bytes == min(sizes.values())
    assert sizes[coded.codec.partition(":fp")[0].partition(":bf")[0]] == coded.coded_bytes
    assert coded.dense_bytes == N * dtype.itemsize
    # The closed forms for zeros at random: within 1 %.
    if 0.02 < sparsity < 0.999 and coded.codec.startswith("csr"):
        bits = int(coded.codec[4:])
        entries = nonzeros / (1 - sparsity ** (2**bits))
        assert coded.coded_bytes == pytest.approx(entries * (width + bits / 8), rel=0.01)
    header = int.from_bytes((tmp_path / "f").read_bytes()[:8], "little")
    assert os.path.getsize(tmp_path / "f") == 8 + header + coded.coded_bytes


def test_ninety_percent_zeros_in_fp32_take_six_bits_an_offset_and_38_bits_a_value() -> None:
    coded = code({"w": pruned(0.9)})["w"]
    assert coded.codec == "csr:6"
    assert coded.coded_bytes / (4 * N) == pytest.approx(0.1 * 38.045 / 32, rel=2e-3)


@pytest.mark.parametrize(
    ("n", "m", "bits"), [(2, 4, 3), (1, 4, 2), (1, 2, 1), (2, 8, 5), (4, 8, 7), (8, 16, 14), (1, 16, 4)]
)
def test_n_of_m_takes_its_values_and_the_bits_to_number_its_patterns(n: int, m: int, bits: int) -> None:
    weight = (torch.rand(64, 320, generator=torch.Generator().manual_seed(0)) + 0.01).reshape(-1, m)
    weight.scatter_(1, weight.topk(m - n, dim=1, largest=False).indices, 0)
    weight, groups = weight.reshape(64, 320), 64 * 320 // m
    coded = code({"w": weight, "plain": weight}, {"w": f"nm:{n}:{m}:1"})
    if coded["w"].codec.startswith("nm"):
        assert coded["w"].coded_bytes == groups * n * 4 + math.ceil(groups * bits / 8)
    hinted = dict(CODECS["nm"].propose(look(weight), (str(n), str(m), "1")))
    assert hinted == {f"{n}:{m}:1": groups * n * 4 + math.ceil(groups * bits / 8)}
    assert coded["w"].coded_bytes <= coded["plain"].coded_bytes
    assert (coded["w"].codec == f"nm:{n}:{m}:1") == (bits < m), "below the bitmask's m bits a group it must win"


@pytest.mark.parametrize(
    "hint",
    [
        *("nm:2:4:1", "nm:2:4", "nm:2:4:9", "nm:4:2:1", "nm:0:4:1", "nm:2:64:0", "nm:٢:4:1", "nm:2:4:-1", "nm"),
        *("csr:99", "grid:int8", "", ":::", "dense:fp16", "nm:" + "9" * 5000),
    ],
)
def test_a_stale_or_senseless_hint_costs_nothing_here_and_never_correctness(tmp_path: Path, hint: str) -> None:
    tensors = {"w": pruned(0.5), "b": random_tensor(torch.int16, (7,), 0, 1)}
    plain = code(tensors)
    assert save_file(tmp_path / "f", tensors, dict.fromkeys([*tensors, "not there"], hint)) == plain
    assert torch.equal(load_file(tmp_path / "f")[0]["w"], tensors["w"])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=120), st.sampled_from([torch.float64, torch.int16, torch.int8])
)
@only(*FLOATS)
def test_no_form_would_have_been_smaller_whatever_the_runs_of_zeros(runs: list[int], dtype: torch.dtype) -> None:
    """Dense has one part and so eighty bytes in hand against the others, which have two."""
    ends = torch.tensor(runs).add(1).cumsum(0) - 1
    tensor = torch.zeros(int(ends[-1]) + 1, dtype=dtype)
    tensor[ends] = 3
    width, bitmask = dtype.itemsize, math.ceil(len(tensor) / 8) + len(runs) * dtype.itemsize
    smallest = min(bitmask, len(tensor) * width - 80, *csr_bytes(tensor, width).values())
    coded = code({"w": tensor})["w"]
    assert coded.coded_bytes - 80 * coded.codec.startswith("dense") == smallest


@only(*FLOATS)
def test_csr_gives_way_to_the_bitmask_at_the_very_filler_that_makes_it_larger() -> None:
    """Runs of one zero fit into one bit, where a mask takes two; each run of two zeros costs a filler of 65 bits."""
    found = []
    for long_runs in range(10, 22):
        ends = torch.tensor([0] * 100 + [1] * 1000 + [2] * long_runs).add(1).cumsum(0) - 1
        tensor = torch.zeros(int(ends[-1]) + 1, dtype=torch.float64)
        tensor[ends] = 0.1
        bits = {"csr:1": 65 * (1100 + 2 * long_runs), "bitmask": 2100 + 3 * long_runs + 64 * (1100 + long_runs)}
        coded = code({"w": tensor})["w"]
        assert coded.coded_bytes == min(math.ceil(size / 8) for size in bits.values())
        found.append(coded.codec)
    assert found == ["csr:1"] * 6 + ["bitmask"] * 6


@only(*FLOATS)
def test_nan_is_stored_in_bf16_or_whole_since_processors_differ_on_nan_in_fp16() -> None:
    assert code({"w": torch.tensor([1.0, float("nan")] * 64)})["w"].codec == "dense:bf16"
    assert code({"w": torch.tensor([1 + 2**-10, float("nan")] * 64)})["w"].codec == "dense:fp32"


@pytest.mark.parametrize(("dtype", "codec"), [(torch.float16, "dense:fp16"), (torch.bfloat16, "dense:bf16")])
@only(*FLOATS)
def test_float32_that_was_rounded_to_half_precision_is_stored_in_half(dtype: torch.dtype, codec: str) -> None:
    weight = torch.randn(5000).to(dtype).float()
    weight[1] = 1e30 if dtype == torch.bfloat16 else 1 + 2**-10  # so that the other type does not hold it
    weight = weight.to(dtype).float()
    assert code({"w": weight})["w"].codec == codec
    assert code({"w": weight})["w"].coded_bytes == 2 * 5000
    for place in (0, 4999):  # one value that needs all bits, wherever it stands
        spoilt = weight.clone()
        spoilt[place] = 0.1
        assert code({"w": spoilt})["w"].codec == "dense:fp32"
    sparse = weight.masked_fill(torch.arange(5000) % 8 < 3, 0)
    sparse[1] = weight[1]
    assert code({"w": sparse})["w"].coded_bytes == int((sparse != 0).sum()) * 2 + 5000 // 8


def test_code_tells_what_save_file_does(tmp_path: Path) -> None:
    tensors = {f"{s}": pruned(s) for s in (0.1, 0.6, 0.95)} | {"bias": torch.zeros(10), "n": torch.tensor(3)}
    assert save_file(tmp_path / "f", tensors) == code(tensors)


@only(*FLOATS)
def test_a_small_bias_is_not_split_to_save_less_than_its_entry_in_the_header_costs() -> None:
    bias = torch.tensor([0.1, 0.0, 0.2, 0.0] * 4)
    assert code({"bias": bias})["bias"].codec == "dense:fp32"


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(1000, 1000),
        nn.Sequential(nn.Linear(784, 1000), nn.Linear(1000, 200), nn.Linear(200, 10)),
        nn.Sequential(nn.Conv2d(3, 64, 3), *(nn.Conv2d(64, 64, 3) for _ in range(25)), nn.Linear(64, 100)),
    ],
    ids=["linear", "mlp", "cnn"],
)
@pytest.mark.parametrize("places", ["random", "smallest"])
def test_a_million_weights_with_ninety_percent_zeros_pack_to_0_122_of_dense(
    tmp_path: Path, model: nn.Module, places: str
) -> None:
    """Of the file, header and dense biases included; the zeros are 90 % of all parameters."""
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    weights = [value for name, value in tensors.items() if name.endswith("weight")]
    total = sum(value.numel() for value in tensors.values())
    flat = torch.cat([weight.reshape(-1).abs() for weight in weights])
    order = torch.randperm(len(flat)) if places == "random" else flat.argsort()
    flat[order[: math.ceil(0.9 * total)]] = 0
    for weight, kept in zip(weights, flat.split([weight.numel() for weight in weights]), strict=True):
        weight[kept.view_as(weight) == 0] = 0
    assert total > 900_000
    assert sum(int((value == 0).sum()) for value in tensors.values()) == pytest.approx(0.9 * total, rel=1e-4)
    save_file(tmp_path / "f", tensors)
    assert os.path.getsize(tmp_path / "f") <= 0.122 * 4 * total
