# SPDX-License-Identifier: Apache-2.0
"""Tensors on grids and codebooks: exact, of the size stated before, read by the page's reader, refused when damaged."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from featherweight.errors import ArtefactError
from featherweight.grids import GridSpec, fit_grid
from featherweight.layers import from_matrix, to_matrix, weights
from featherweight.pack import code, load_file, save_file
from featherweight.pack.codecs import CODECS
from featherweight.pack.layout import layout_of
from featherweight.pack.source import look
from featherweight.pack.symbols import FLOATS, check_tables, symbols, words_of
from featherweight.pack.words import Spec
from tests.pack import reader
from tests.pack.samples import bit_patterns, only
from tests.pack.test_damage import claim, forge, refused

SHAPES = [(40,), (6, 40), (40, 6), (8, 4, 3), (4, 6, 3, 3), (3, 2, 2, 3, 4)]
FIXED = "dense", "int", "codebook"


def quantized(
    shape: tuple[int, ...], word: str, bits: int, symmetric: bool, dtype: torch.dtype, seed: int, sparsity: float
) -> torch.Tensor:
    """Random integers of a layout, times random scales; the rows are made by the page's reader, not by ours."""
    rng = np.random.default_rng(seed)
    numbers = np.array(reader.pieces(list(shape), word))
    scale = rng.uniform(0.01, 1, numbers.max() + 1).astype(np.float32)
    low = -(1 << (bits - 1))
    zero_point = np.zeros(len(scale), np.int64) if symmetric else rng.integers(low, -low, len(scale))
    k = rng.integers(low, max(1, -low), len(numbers)) - zero_point[numbers]
    k = 2 * rng.integers(0, 2, len(numbers)) - 1 if bits == 1 else np.where(rng.random(len(k)) < sparsity, 0, k)
    values = torch.from_numpy(scale[numbers].astype(np.float64) * k)
    return (values if dtype == torch.float64 else values.float().to(dtype)).view(shape)


@settings(max_examples=40)
@given(
    st.sampled_from(SHAPES),
    st.sampled_from(["all", "0", "1", "1x2", "0/5", "1/4"]),
    st.integers(1, 16),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    st.integers(0, 10_000),
    st.sampled_from([0.0, 0.5, 0.9]),
)
def test_grids_come_back_and_the_page_suffices_to_read_them(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, ...],
    word: str,
    bits: int,
    symmetric: bool,
    dtype: torch.dtype,
    seed: int,
    sparsity: float,
) -> None:
    path = tmp_path_factory.getbasetemp() / "grids.safetensors"
    word = word if len(shape) > 1 and fits(word, shape) else "all"
    tensor = quantized(shape, word, bits, symmetric, dtype, seed, sparsity)
    source = look(tensor, f"int:{bits}:{word.partition('/')[2]}")
    for kind in ("int", "codebook"):
        for text, size in CODECS[kind].propose(source, ()):
            params = tuple(text.split(":"))
            parts = CODECS[kind].encode(source, params)
            assert sum(part.nbytes for part in parts.values()) == size
            CODECS[kind].check(source.spec, params, {key: Spec(tuple(p.shape), p.dtype) for key, p in parts.items()})
            assert np.array_equal(CODECS[kind].decode(source.spec, params, parts), source.words)
            with only("dense", kind):
                coded = save_file(path, {"w": tensor}, {"w": ":".join(source.hint)})["w"]
            assert torch.equal(load_file(path)[0]["w"], tensor)
            by_page, _ = reader.read(path.read_bytes())
            assert by_page["w"] == (coded.dtype, list(shape), bit_patterns(tensor))
    for view in symbols(source):
        assert np.array_equal(view.signed == 0, source.words == 0)
        specs = {key: Spec(tuple(table.shape), table.dtype) for key, table in view.tables.items()}
        check_tables(source.spec, view.kind, view.params, specs)
        assert np.array_equal(words_of(source.spec, view.kind, view.params, view.signed, view.tables), source.words)


def fits(word: str, shape: tuple[int, ...]) -> bool:
    try:
        layout_of(word, shape)
    except ArtefactError:
        return False
    return True


MODULES = {
    "linear": (nn.Linear(48, 24), "0"),
    "conv": (nn.Conv2d(16, 24, 3), "0"),
    "depthwise": (nn.Conv2d(24, 24, 5, groups=24), "0"),
    "transposed conv": (nn.ConvTranspose2d(16, 24, 3), "1"),
    "grouped transposed conv": (nn.ConvTranspose1d(16, 24, 9, groups=4), "1x4"),
    "depthwise transposed conv": (nn.ConvTranspose1d(24, 24, 9, groups=24), "0"),
    "embedding": (nn.Embedding(40, 32), "0"),
}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", MODULES)
def test_rows_of_every_kind_of_layer_are_found(kind: str, bits: int) -> None:
    module, word = MODULES[kind]
    weight = weights(module)[0][0]
    matrix = to_matrix(weight, torch.randn(weight.parameter.shape, generator=torch.Generator().manual_seed(0)))
    tensor = from_matrix(weight, fit_grid(matrix, GridSpec(bits, symmetric=True)).nearest(matrix))
    with only("dense", "int"):
        coded = code({"w": tensor})["w"]
    assert coded.codec == f"int:{bits}:{word}"
    assert coded.coded_bytes == -(-tensor.numel() * bits // 8) + 4 * len(matrix)


@pytest.mark.parametrize("chunk", [32, 48, 64, 128])
@pytest.mark.parametrize("module", [nn.Linear(384, 8), nn.Conv1d(96, 8, 4), nn.ConvTranspose1d(96, 8, 4)], ids=str)
def test_chunks_are_those_of_the_solvers_columns(module: nn.Module, chunk: int) -> None:
    weight = weights(module)[0][0]
    matrix = to_matrix(weight, torch.randn(weight.parameter.shape, generator=torch.Generator().manual_seed(1)))
    tensor = from_matrix(weight, fit_grid(matrix, GridSpec(4, chunk=chunk)).nearest(matrix))
    with only("dense", "int"):
        coded = code({"w": tensor}, {"w": f"int:4:{chunk}"})["w"]
        unhinted = code({"w": tensor})["w"]
    assert coded.codec.startswith("int:4:") and f"/{chunk}" in coded.codec
    assert (unhinted.codec == coded.codec) == (chunk != 48)  # only powers of two are tried unasked


def test_a_hint_that_is_wrong_costs_nothing() -> None:
    tensor = torch.randn(64, 64)
    plain = fit_grid(tensor, GridSpec(4)).nearest(tensor)
    with only(*FIXED):
        least = code({"w": plain})["w"].coded_bytes
    for hint in ("int:4:7", "int:4:0", "int:x:y", "int", "int:4:99999999999999999999", "codebook:3"):
        with only(*FIXED):
            assert code({"w": plain}, {"w": hint})["w"].coded_bytes <= least
        assert code({"w": tensor}, {"w": hint})["w"].codec == "dense:fp32"


def test_one_scale_for_all_is_preferred_and_zero_points_come_first_in_the_stream() -> None:
    with only("dense", "int"):
        tensor = torch.arange(-4.0, 60.0).view(4, 16) / 8
        source = look(tensor)
        [(params, size)] = CODECS["int"].propose(source, ())
        assert (params, size) == ("6:all:z", -(-65 * 6 // 8) + 2)  # a scale of 1/8 takes two bytes
        parts = CODECS["int"].encode(source, ("6", "all", "z"))
    assert reader.fields(parts["integers"].numpy().tobytes(), 6, 3) == [4, 0, 1]
    assert parts["scale"].dtype == torch.float16


def test_rows_far_from_zero_have_their_zero_point_within_the_bits() -> None:
    tensor = torch.randint(3, 16, (8, 30), generator=torch.Generator().manual_seed(0)) * torch.rand(8, 1)
    source = look(tensor)
    [(params, size)] = CODECS["int"].propose(source, ())
    assert (params, size) == ("4:0:z", -(-(8 * 30 + 8) * 4 // 8) + 32)
    parts = CODECS["int"].encode(source, tuple(params.split(":")))
    assert reader.fields(parts["integers"].numpy().tobytes(), 4, 8) == [0] * 8
    assert np.array_equal(CODECS["int"].decode(source.spec, tuple(params.split(":")), parts), source.words)


def test_negative_zero_is_no_multiple_and_an_entry_like_any_other() -> None:
    tensor = torch.tensor([0.5, -0.0, 0.0, 1.0] * 20)
    source = look(tensor)
    assert [view.kind for view in symbols(source)] == ["codebook"]
    signed = next(symbols(source)).signed
    assert signed[:4].tolist() == [1, -1, 0, 2]
    assert bit_patterns(load_back(tensor)) == bit_patterns(tensor)


def load_back(tensor: torch.Tensor) -> torch.Tensor:
    source = look(tensor)
    [(params, _)] = CODECS["codebook"].propose(source, ())
    decoded = CODECS["codebook"].decode(source.spec, (params,), CODECS["codebook"].encode(source, (params,)))
    return torch.from_numpy(decoded.view(np.float32)).view(tensor.shape)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_codebooks_count_from_zero_in_order_of_value(dtype: torch.dtype, zero: bool) -> None:
    values = torch.tensor([-torch.inf, -2.1, -0.3, 1e-7, 0.4, torch.nan] + [0.0] * zero, dtype=dtype)
    picks = torch.randint(0, len(values), (500,), generator=torch.Generator().manual_seed(0))
    tensor = values[picks]
    view = next(view for view in symbols(look(tensor)) if view.kind == "codebook")
    expected = torch.tensor([-3, -2, -1, 1, 2, 3] + [0] * zero)[picks]
    assert view.signed.tolist() == expected.tolist()
    assert view.params == (str(6 + zero),)


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(64), torch.ones(64), torch.full((64,), torch.nan), torch.tensor([3.0, 0.0] * 40), -torch.ones(9, 9)],
    ids=["zeros", "ones", "nan", "two", "minus one"],
)
def test_tensors_of_one_or_two_values_come_back(tmp_path: Path, tensor: torch.Tensor) -> None:
    for kinds in (("dense", "int"), ("dense", "codebook"), tuple(CODECS)):
        with only(*kinds):
            save_file(tmp_path / "f", {"w": tensor})
        assert bit_patterns(load_file(tmp_path / "f")[0]["w"]) == bit_patterns(tensor)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_weights_that_went_through_a_half_type_are_stored_in_two_bytes(half: torch.dtype) -> None:
    tensor = torch.randn(300, 100).to(half).float()
    with only("dense", "int", "codebook"):
        coded = code({"w": tensor})["w"]
    assert coded.coded_bytes <= 2 * tensor.numel()


def test_numbers_and_tables_that_cannot_be_are_refused() -> None:
    spec, scale = Spec((4, 4), torch.float32), torch.ones(4)
    with pytest.raises(ArtefactError, match="15 numbers for 16"):
        words_of(spec, "int", ("4", "0"), np.zeros(15, np.int32), {"scale": scale})
    with pytest.raises(ArtefactError, match="beyond 16 bits"):
        words_of(spec, "int", ("4", "0"), np.full(16, 1 << 20, np.int32), {"scale": scale})
    for wrong in (torch.nan, torch.inf, 0.0, -1.0):
        with pytest.raises(ArtefactError, match="not a positive number"):
            words_of(spec, "int", ("4", "0"), np.zeros(16, np.int32), {"scale": torch.full((4,), wrong)})
    for number in (-2, 2, 1 << 30):
        with pytest.raises(ArtefactError, match="none of the 2 entries"):
            words_of(spec, "codebook", ("2",), np.full(16, number, np.int32), {"codebook": torch.tensor([-1.0, 1.0])})
    with pytest.raises(ArtefactError, match="which the codebook has not"):
        words_of(spec, "codebook", ("2",), np.zeros(16, np.int32), {"codebook": torch.tensor([-1.0, 1.0])})
    with pytest.raises(ArtefactError, match="order"):
        words_of(spec, "codebook", ("2",), np.ones(16, np.int32), {"codebook": torch.tensor([1.0, 1.0])})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A small file with an asymmetric grid by chunks, one bit, and a codebook."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(6, 80, generator=generator)
    tensors = {
        "int": fit_grid(W, GridSpec(4, chunk=32)).nearest(W),
        "sign": fit_grid(W, GridSpec(1)).nearest(W),
        "codebook": torch.tensor([0.1, -0.25, 0.7, 0.9, 0.0])[torch.randint(0, 5, (10, 20), generator=generator)],
    }
    with only(*FIXED):
        coded = save_file(tmp_path / "f", tensors)
    assert [c.codec for c in coded.values()] == ["int:4:0/32:z", "int:1:0", "codebook:5"]
    return tmp_path / "f"


def test_every_flipped_byte_of_grids_and_codebooks_is_found(path: Path) -> None:
    blob = path.read_bytes()
    for place in range(0, len(blob), 2):
        damaged = bytearray(blob)
        damaged[place] ^= 1 << place // 2 % 8
        refused(path, bytes(damaged))


FORGED = {
    "no bits": (claim("int", 0, "int:0:0/32:z"), "int takes 1 to 16 bits"),
    "17 bits": (claim("int", 0, "int:17:0/32:z"), "int takes 1 to 16 bits"),
    "bits of another kind": (claim("int", 0, "int:４:0/32:z"), "int takes"),
    "other bits": (claim("int", 0, "int:5:0/32:z"), "bits take"),
    "no layout": (claim("int", 0, "int:4"), "int takes"),
    "nothing": (claim("int", 0, "int"), "int takes"),
    "no zero points": (claim("int", 0, "int:4:0/32"), "take 240 bytes"),
    "zero points by another name": (claim("int", 0, "int:4:0/32:y"), "perhaps"),
    "zero points twice": (claim("int", 0, "int:4:0/32:z:z"), "perhaps"),
    "zero points of one bit": (claim("sign", 0, "int:1:0:z"), "perhaps"),
    "another chunk": (claim("int", 0, "int:4:0/16:z"), "a scale of shape"),
    "a chunk of none": (claim("int", 0, "int:4:0/0:z"), "no rows of the kind"),
    "a chunk of all": (claim("int", 0, "int:4:0/80:z"), "no rows of the kind"),
    "a second spelling of a chunk": (claim("int", 0, "int:4:0/032:z"), "no rows of the kind"),
    "a third axis": (claim("int", 0, "int:4:2/32:z"), "no rows of the kind"),
    "groups of axis 0": (claim("int", 0, "int:4:0x2/32:z"), "no rows of the kind"),
    "groups that do not divide": (claim("int", 0, "int:4:1x5:z"), "no rows of the kind"),
    "a huge layout": (claim("int", 0, f"int:4:0/{1 << 60}:z"), "no rows of the kind"),
    "a huge tensor": (claim("int", 2, [1 << 40, 80]), "a scale of shape"),
    "a huge tensor of few rows": (claim("sign", 2, [6, 1 << 40]), "take"),
    "an empty tensor": (claim("sign", 2, [0, 80]), "no rows of the kind"),
    "another type": (claim("int", 1, "int32"), "is not stored as int"),
    "a type of the same size": (claim("codebook", 1, "uint32"), "is not stored as codebook"),
    "no entries": (claim("codebook", 0, "codebook:0"), "codebook takes"),
    "too many entries": (claim("codebook", 0, "codebook:4097"), "codebook takes"),
    "other entries": (claim("codebook", 0, "codebook:6"), "a codebook of shape"),
    "more parameters": (claim("codebook", 0, "codebook:5:1"), "codebook takes"),
    "a huge tensor of few values": (claim("codebook", 2, [1 << 40]), "take 412316860416 bytes"),
    "integers that are no bytes": (
        lambda outer, about: outer["sign:integers"].__setitem__("dtype", "BOOL"),
        "integers of 1 bits",
    ),
}


@pytest.mark.parametrize("case", FORGED)
def test_claims_that_the_parts_do_not_bear_out_are_refused_unallocated(path: Path, case: str) -> None:
    change, reason = FORGED[case]
    blob = forge(path.read_bytes(), change)
    tracemalloc.start()
    refused(path, blob, reason)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize(
    ("name", "suffix", "data", "reason"),
    [
        ("codebook", "indices", bytes([0xFF]) * 75, "an index is 7"),
        ("sign", "scale", bytes(24), "not a positive number"),
        ("sign", "scale", np.full(6, np.nan, np.float32).tobytes(), "not a positive number"),
    ],
)
def test_contents_that_stand_for_nothing_are_refused_with_right_checksums(
    path: Path, name: str, suffix: str, data: bytes, reason: str
) -> None:
    import zlib

    blob = path.read_bytes()
    length = int.from_bytes(blob[:8], "little")
    outer, body = json.loads(blob[8 : 8 + length]), bytearray(blob[8 + length :])
    start, stop = outer[f"{name}:{suffix}"]["data_offsets"]
    assert stop - start == len(data)
    body[start:stop] = data
    crc32 = 0
    for part in CODECS["int" if name == "sign" else name].PARTS:
        start, stop = outer[f"{name}:{part}"]["data_offsets"]
        crc32 = zlib.crc32(body[start:stop], crc32)
    refused(path, forge(blob[: 8 + length] + bytes(body), claim(name, 3, crc32)), reason)


def test_a_pruned_and_quantized_network_keeps_its_zeros_and_its_grid(tmp_path: Path) -> None:
    W = torch.randn(128, 256, generator=torch.Generator().manual_seed(0))
    W.view(128, -1, 4).scatter_(2, W.view(128, -1, 4).abs().topk(2, dim=2, largest=False).indices, 0)
    grid = fit_grid(W, GridSpec(4, symmetric=True))
    values = grid.nearest(W)
    coded = save_file(tmp_path / "f", {"w": values}, {"w": "nm:2:4:1"})["w"]
    loaded = load_file(tmp_path / "f")[0]["w"]
    assert torch.equal(loaded, values) and coded.coded_bytes <= values.numel() / 2 + 4 * 128
    assert bool((loaded[W == 0] == 0).all())


def test_what_torch_quantizes_is_found() -> None:
    """torch's own fake quantization leaves zeros of either sign; a grid has one."""
    W = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    scale, zero_point = torch.rand(16) / 50 + 0.01, torch.randint(-9, 9, (16,), dtype=torch.int32)
    values = torch.fake_quantize_per_channel_affine(W, scale, zero_point, 0, -128, 127) + 0.0
    with only("dense", "int"):
        assert code({"w": values})["w"].codec.startswith("int:8:0")


def test_the_example_of_the_page_in_bytes() -> None:
    spec, tensor = Spec((8,), torch.float32), torch.tensor([0, 0.1, 0, 0, 0, 0, -0.2, 0])
    for text, first, second in (
        ("int:2:all", ("integers", "ae8a"), ("scale", "cdcccc3d")),
        ("codebook:3", ("indices", "5945"), ("codebook", "cdcc4cbe00000000cdcccc3d")),
    ):
        kind, *params = text.split(":")
        parts = {
            first[0]: torch.tensor(list(bytes.fromhex(first[1])), dtype=torch.uint8),
            second[0]: torch.from_numpy(np.frombuffer(bytes.fromhex(second[1]), np.float32).copy()),
        }
        assert CODECS[kind].decode(spec, tuple(params), parts).tolist() == bit_patterns(tensor)
