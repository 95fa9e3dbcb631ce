# SPDX-License-Identifier: Apache-2.0
"""The entropy codec: tensors come back, the format page suffices to read them, sizes are true, and forgeries end in errors."""

import time
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from featherweight.errors import ArtefactError
from featherweight.pack import entropy
from featherweight.pack.source import Source, look
from featherweight.pack.words import Spec
from tests.pack import entropy_reader

CODERS = ("huffman", "rans", "adaptive")


def weight(kind: str, shape: tuple[int, ...], sparsity: float, seed: int) -> Tensor:
    """Values of a grid with a scale per row, or of a codebook, with zeros."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    zeros = torch.rand(shape, generator=generator) < sparsity
    if kind == "grid":
        scale = 0.01 + torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator)
        return ((normal * 3).round().clamp(-7, 7) * scale).masked_fill(zeros, 0)
    entries = torch.randn(12, generator=generator).sort().values
    return entries[(normal * 2 + 6).long().clamp(0, 11)].masked_fill(zeros, 0)


def coded(source: Source, text: str) -> bytes:
    return entropy.encode(source, tuple(text.split(":")))["coded"].numpy().tobytes()


def parts(data: bytes) -> dict[str, Tensor]:
    return {"coded": torch.tensor(list(data), dtype=torch.uint8)}


SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(lambda sizes: (*sizes, 16))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["grid", "codebook"]), SHAPES, st.floats(0, 1), st.integers(0, 10_000))
def test_tensors_come_back_and_the_page_suffices_to_read_their_numbers(
    kind: str, shape: tuple[int, ...], sparsity: float, seed: int
) -> None:
    source = look(weight(kind, shape, sparsity, seed))
    for view in source.symbols:
        for coder in CODERS:
            params = (view.kind, *view.params, coder)
            data = coded(source, ":".join(params))
            entropy.check(source.spec, params, {"coded": Spec((len(data),), torch.uint8)})
            assert np.array_equal(entropy.decode(source.spec, params, parts(data)), source.words)
            _, table, numbers = entropy_reader.read(data, coder, list(shape))
            assert numbers == view.signed.tolist()
            assert table == next(iter(view.tables.values())).view(torch.uint8).numpy().tobytes()


def test_many_lanes_are_read_as_the_page_says() -> None:
    source = look(weight("codebook", (40, 1000), 0.3, 0))
    [view] = source.symbols
    for coder in ("huffman", "rans"):
        data = coded(source, ":".join((view.kind, *view.params, coder)))
        assert entropy_reader.read(data, coder, [40, 1000])[2] == view.signed.tolist()


def test_proposed_sizes_are_those_of_the_parts() -> None:
    source = look(weight("codebook", (60, 50), 0.9, 0))
    proposed = dict(entropy.propose(source, ()))
    assert {text.rpartition(":")[2] for text in proposed} == set(CODERS)
    for text, size in proposed.items():
        assert size == len(coded(source, text))
        assert coded(look(weight("codebook", (60, 50), 0.9, 0)), text) == coded(source, text)


def test_the_adaptive_coder_is_for_small_tensors_or_for_who_asks() -> None:
    source = look(weight("codebook", (300, 400), 0.95, 0))
    assert not any(text.endswith("adaptive") for text, _ in entropy.propose(source, ("codebook", "12", "rans")))
    assert any(text.endswith("adaptive") for text, _ in entropy.propose(source, ("codebook", "12", "adaptive")))


@pytest.mark.parametrize("tensor", [torch.randn(300, 300), torch.arange(64), torch.zeros(0, 5), torch.ones(3)])
def test_ordinary_floats_integers_and_scraps_are_left_to_other_codecs(tensor: Tensor) -> None:
    assert not list(entropy.propose(look(tensor), ("int", "8", "all", "adaptive")))


def test_numbers_take_what_their_entropy_and_their_places_say() -> None:
    """Places of K of N at random: log2 of how many there are; values: their entropy. Static rANS within 1 %, and tables."""
    source = look(weight("codebook", (500, 1000), 0.95, 0))
    [view] = source.symbols
    share = source.nonzeros / source.spec.length
    places = -source.spec.length * (share * np.log2(share) + (1 - share) * np.log2(1 - share)) / 8
    _, counts = np.unique(view.signed[view.signed != 0], return_counts=True)
    values = -float((counts * np.log2(counts / counts.sum())).sum()) / 8
    [size] = [size for text, size in entropy.propose(source, ()) if text.endswith("rans")]
    assert places + values < size < 1.01 * (places + values) + 250


FORGED = {
    "no coder": (("codebook", "12"), 100, "takes a kind"),
    "an unknown kind": (("float", "12", "rans"), 100, "takes a kind"),
    "an unknown coder": (("codebook", "12", "zip"), 100, "takes a kind"),
    "no parameters": (("",), 100, "takes a kind"),
    "a huge tensor from few bytes": (("codebook", "12", "rans"), 1 << 40, "cannot stand for"),
    "an adaptive tensor that takes hours": (("codebook", "12", "adaptive"), 1 << 25, "cannot stand for"),
}


@pytest.mark.parametrize("case", FORGED)
def test_claims_that_the_bytes_cannot_bear_out_are_refused(case: str) -> None:
    params, length, reason = FORGED[case]
    with pytest.raises(ArtefactError, match=reason):
        entropy.check(Spec((length,), torch.float32), params, {"coded": Spec((1000,), torch.uint8)})


def test_a_part_that_is_no_row_of_bytes_is_refused() -> None:
    for wrong in (Spec((10, 10), torch.uint8), Spec((100,), torch.int8)):
        with pytest.raises(ArtefactError, match="row of bytes"):
            entropy.check(Spec((50,), torch.float32), ("codebook", "12", "rans"), {"coded": wrong})


def test_a_later_version_is_refused_by_name() -> None:
    source = look(weight("codebook", (60, 50), 0.9, 0))
    [view] = source.symbols
    params = (view.kind, *view.params, "rans")
    data = coded(source, ":".join(params))
    with pytest.raises(ArtefactError, match=r"version 2 .* install"):
        entropy.decode(source.spec, params, parts(b"\2" + data[1:]))


@pytest.mark.parametrize("coder", CODERS)
def test_any_flipped_byte_ends_in_an_error_or_in_a_tensor_of_that_size_at_once(coder: str) -> None:
    """As if the checksums had been forged along: no crash, no hang, no memory beyond what the tensor takes."""
    source = look(weight("codebook", (30, 30), 0.9, 0))
    [view] = source.symbols
    params = (view.kind, *view.params, coder)
    data = coded(source, ":".join(params))
    rng = np.random.default_rng(0)
    begin, refused, peak = time.process_time(), 0, 0
    for place in (*range(40), *range(40, len(data), 4)):
        if place == 0:
            tracemalloc.start()  # for the first bytes, which tell sizes; it is slow
        if place == 12:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        damaged = bytearray(data)
        damaged[place] ^= int(rng.integers(1, 256))
        try:
            found = entropy.decode(source.spec, params, parts(bytes(damaged)))
        except ArtefactError:
            refused += 1
        else:
            assert len(found) == source.spec.length
    assert refused > 5
    assert peak < 4_000_000
    assert time.process_time() - begin < 0.2 * len(data)
    for length in range(0, len(data), 9):
        if coder != "adaptive":
            with pytest.raises(ArtefactError):
                entropy.decode(source.spec, params, parts(data[:length]))
