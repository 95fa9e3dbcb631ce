# SPDX-License-Identifier: Apache-2.0
"""What is loaded is what was saved, to the last bit; a reader written from the format page alone agrees."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from featherweight.pack import load_file, read_header, save_file
from featherweight.pack.codecs import CODECS
from featherweight.pack.source import look
from featherweight.pack.words import Spec, typed, words
from tests.pack import reader
from tests.pack.samples import DTYPES, FLOATS, ODD, bit_patterns, only, random_tensor

SHAPES = st.lists(st.integers(0, 9), max_size=4).map(tuple)
SPARSITIES = st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bit_patterns(a) == bit_patterns(b)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(DTYPES), SHAPES, SPARSITIES, st.integers(0, 10_000), st.sampled_from(["", "nm:2:4:1", "csr:x"]))
def test_any_tensor_comes_back_and_the_page_suffices_to_read_it(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    sparsity: float,
    seed: int,
    hint: str,
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    tensors = {
        "a.weight": random_tensor(dtype, shape, sparsity, seed),
        "b": random_tensor(dtype, (40, 30), sparsity, seed + 1),
        "ключ": random_tensor(torch.float32, (3, 70), 0.9, seed),
    }
    with only(*FLOATS, "int", "codebook"):
        coded = save_file(path, tensors, hints={"a.weight": hint, "b": hint, "gone": "nm:1:2:0"})
    loaded, ties = load_file(path)
    assert list(loaded) == list(tensors) and not ties
    by_page, _ = reader.read(path.read_bytes())
    for name, tensor in tensors.items():
        assert same(loaded[name], tensor)
        assert loaded[name].is_contiguous()
        assert by_page[name] == (coded[name].dtype, list(tensor.shape), bit_patterns(tensor))
    with safe_open(path, "pt") as file:
        assert {key for key in file.keys() if ":" not in key} == {  # noqa: SIM118 (not a dict)
            name for name in tensors if coded[name].codec.startswith("dense")
        }
        for key in file.keys():  # noqa: SIM118
            file.get_tensor(key)
    assert read_header(path) == (coded, {})


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(DTYPES), st.integers(0, 400), SPARSITIES, st.integers(1, 16), st.integers(0, 10_000))
def test_each_codec_is_exact_for_each_type_also_where_it_would_never_win(
    dtype: torch.dtype, length: int, sparsity: float, bits: int, seed: int
) -> None:
    tensor = random_tensor(dtype, (length,), sparsity, seed)
    source, patterns = look(tensor), bit_patterns(tensor)
    for codec, params in (("bitmask", ()), ("csr", (str(bits),))):
        parts = CODECS[codec].encode(source, params)
        CODECS[codec].check(
            source.spec, params, {key: Spec(tuple(part.shape), part.dtype) for key, part in parts.items()}
        )
        assert CODECS[codec].decode(source.spec, params, parts).tolist() == patterns


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from([dtype for dtype in DTYPES if dtype.itemsize <= 8]),
    st.lists(st.integers(0, 6), max_size=3),
    st.integers(0, 20),
    st.integers(0, 3),
    st.integers(2, 16).flatmap(lambda m: st.tuples(st.integers(1, m - 1), st.just(m))),
    SPARSITIES,
    st.integers(0, 10_000),
)
def test_n_of_m_is_exact_along_any_axis_with_ragged_groups_and_missing_values(
    dtype: torch.dtype,
    others: list[int],
    length: int,
    axis: int,
    n_of_m: tuple[int, int],
    sparsity: float,
    seed: int,
) -> None:
    (n, m), axis = n_of_m, min(axis, len(others))
    shape = [*others[:axis], length, *others[axis:]]
    tensor = random_tensor(dtype, tuple(shape), sparsity, seed)
    keep_n_of_m(tensor, n, m, axis)
    params, patterns = (str(n), str(m), str(axis)), bit_patterns(tensor)
    source = look(tensor)
    parts = CODECS["nm"].encode(source, params)
    assert dict(CODECS["nm"].propose(source, params)) == {":".join(params): sum(part.nbytes for part in parts.values())}
    specs = {key: Spec(tuple(part.shape), part.dtype) for key, part in parts.items()}
    CODECS["nm"].check(source.spec, params, specs)
    assert CODECS["nm"].decode(source.spec, params, parts).tolist() == patterns
    narrowed = {torch.float16: "F16", torch.bfloat16: "BF16"} if dtype == torch.float32 else {}
    code = narrowed.get(parts["values"].dtype, f"U{8 * dtype.itemsize}")
    stored = parts["values"].reshape(-1).view(torch.uint8).numpy().tobytes()
    values = reader.stored_words(stored, code, str(dtype).removeprefix("torch."))
    assert reader.decode_nm(shape, n, m, axis, parts["positions"].numpy().tobytes(), values) == patterns


def keep_n_of_m(tensor: torch.Tensor, n: int, m: int, axis: int) -> None:
    """Zeroes, in place, all but n of the non-zeros in each group."""
    data = tensor.reshape(-1).view(torch.uint8).numpy().view(f"u{tensor.dtype.itemsize}")
    lines = np.moveaxis(data.reshape(tensor.shape), axis, -1)
    for index in np.ndindex(lines.shape[:-1]):
        for start in range(0, lines.shape[-1], m):
            group = lines[index][start : start + m]
            group[np.flatnonzero(group)[n:]] = 0


def test_the_example_of_the_page_in_bytes(tmp_path: Path) -> None:
    tensor = torch.tensor([0, 0.1, 0, 0, 0, 0, -0.2, 0])
    source = look(tensor)
    expected = {
        "bitmask": ("mask", "42", "cdcccc3dcdcc4cbe"),
        "csr:2": ("offsets", "0d", "cdcccc3d00000000cdcc4cbe"),
        "nm:2:4:0": ("positions", "08", "00000000cdcccc3d00000000cdcc4cbe"),
    }
    for text, (index, index_hex, values_hex) in expected.items():
        kind, *params = text.split(":")
        parts = CODECS[kind].encode(source, tuple(params))
        assert parts[index].numpy().tobytes().hex() == index_hex
        assert parts["values"].numpy().tobytes().hex() == values_hex


@pytest.mark.parametrize("bits", ODD)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95])
def test_odd_values_keep_every_bit(tmp_path: Path, bits: int, sparsity: float) -> None:
    words = torch.full((2000,), bits, dtype=torch.int64).to(torch.uint32)
    words[: int(2000 * sparsity)] = 0
    tensor = words.view(torch.float32)
    save_file(tmp_path / "f", {"w": tensor})
    assert same(load_file(tmp_path / "f")[0]["w"], tensor)


def test_a_single_element_is_read_and_made_at_any_stride() -> None:
    one = torch.arange(6.0)[1::5]
    assert one.stride() == (5,) and one.is_contiguous()
    assert words(one).tolist() == [0x3F800000]
    word = np.arange(6, dtype="<u4")[1::5]
    assert typed(word, torch.float32).view(torch.int32).tolist() == [1]


def test_strides_views_and_lazy_bits_are_read_as_values(tmp_path: Path) -> None:
    base = random_tensor(torch.complex64, (6, 8, 4, 4), 0.7, 5)
    real = random_tensor(torch.float32, (6, 8, 4, 4), 0.7, 3)
    tensors = {
        "transposed": real.transpose(0, 3),
        "strided": real[::2, 1::3],
        "expanded": torch.ones(1).expand(5, 7),
        "channels_last": real.to(memory_format=torch.channels_last),
        "conjugate": base.conj(),
        "negative": base.conj().imag,
        "parameter": torch.nn.Parameter(real),
        "scalar": torch.tensor(float("nan")),
        "nothing": torch.empty(0, 3),
        "many axes": real.reshape(6, 8, *([1] * 40), 16),
    }
    save_file(tmp_path / "f", tensors)
    loaded, _ = load_file(tmp_path / "f")
    for name, tensor in tensors.items():
        assert same(loaded[name], tensor.detach().resolve_conj().resolve_neg().contiguous()), name


@only(*FLOATS)
def test_tensors_longer_than_a_slice_come_back(tmp_path: Path) -> None:
    """Slices are 2**17 words long: runs of zeros that cross them, and runs that are longer than one."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for sparsity in (0.3, 0.5, 0.93, 0.9999):
        tensors[f"{sparsity}"] = torch.randn(521, 1031, generator=generator)
        tensors[f"{sparsity}"][torch.rand(521, 1031, generator=generator) < sparsity] = 0
    tensors["ends"] = torch.zeros(700_000)
    tensors["ends"][[0, 131_071, 131_072, 600_000]] = 0.3
    tensors["zeros"] = torch.zeros(700_000)
    groups = torch.randn(90_000, 8, generator=generator)
    groups.scatter_(1, groups.abs().topk(5, dim=1, largest=False).indices, 0)
    tensors["nm"] = groups.reshape(300, -1)
    tensors["nm of axis 0"] = groups.reshape(300, -1).t().contiguous()
    hints = {"nm": "nm:3:8:1", "nm of axis 0": "nm:3:8:0"}
    coded = save_file(tmp_path / "f", tensors, hints)
    assert {coded[name].codec.partition(":")[0] for name in tensors} == {"bitmask", "csr", "nm"}
    loaded, _ = load_file(tmp_path / "f")
    assert all(torch.equal(loaded[name].view(torch.int32), tensors[name].view(torch.int32)) for name in tensors)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_on_a_gpu_are_packed_as_on_the_cpu(tmp_path: Path) -> None:
    tensor = random_tensor(torch.float32, (64, 64), 0.9, 0)
    save_file(tmp_path / "f", {"w": tensor.cuda()})
    assert same(load_file(tmp_path / "f")[0]["w"], tensor)
