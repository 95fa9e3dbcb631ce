# SPDX-License-Identifier: Apache-2.0
"""Damaged, cut, forged and foreign files end in an `ArtefactError` before memory is taken for what they claim."""

import io
import json
import pickle
import re
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from featherweight.errors import ArtefactError
from featherweight.pack import csr, load_file, read_header, save_file
from featherweight.pack.words import blank
from tests.pack.samples import random_tensor

BEGIN = b'{"__metadata__":{"crc32":"'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A small file with every codec, a narrowed tensor and a tie."""
    groups = torch.rand(64, 8) + 0.01
    groups.reshape(-1, 4).scatter_(1, groups.reshape(-1, 4).topk(2, dim=1).indices, 0)
    bitmask, csr = torch.rand(20, 30) + 0.01, torch.zeros(10, 60)
    bitmask[torch.rand(20, 30) < 0.5] = 0
    csr[:, ::12] = torch.rand(10, 5) + 0.01
    tensors = {"nm": groups, "bitmask": bitmask, "csr": csr, "half": torch.ones(3), "n": torch.tensor(5)}
    coded = save_file(tmp_path / "f", tensors, {"nm": "nm:2:4:1"}, {"alias": "csr"})
    assert {c.codec.partition(":")[0] for c in coded.values()} == {"nm", "bitmask", "csr", "dense"}
    return tmp_path / "f"


def refused(path: Path, blob: bytes, reason: str | None = None) -> None:
    """Neither loads nor takes memory; the message names the file."""
    path.write_bytes(blob)
    with pytest.raises(ArtefactError, match=reason) as caught:
        load_file(path)
    assert str(path) in str(caught.value)


def test_every_flipped_byte_is_found(path: Path) -> None:
    """All bytes of the header, every third of the data."""
    blob = path.read_bytes()
    start = 8 + int.from_bytes(blob[:8], "little")
    rng = np.random.default_rng(0)
    for place in (*range(start), *range(start, len(blob), 3)):
        damaged = bytearray(blob)
        damaged[place] ^= int(rng.choice([1, 2, 4, 8, 16, 32, 64, 128, 255]))
        refused(path, bytes(damaged))


def test_every_length_but_the_right_one_is_refused(path: Path) -> None:
    blob = path.read_bytes()
    for length in range(0, len(blob), 7):
        refused(path, blob[:length])
    refused(path, blob[:-1])
    refused(path, blob + b"\0", "cut short or added to")


def test_swapped_data_of_two_tensors_are_found(tmp_path: Path) -> None:
    save_file(tmp_path / "f", {"a": torch.rand(40), "b": torch.rand(40)})
    blob = (tmp_path / "f").read_bytes()
    refused(tmp_path / "f", blob[:-320] + blob[-160:] + blob[-320:-160], "checksum")


def forge(blob: bytes, change: Callable[[dict[str, Any], dict[str, Any]], None], raw: bool = False) -> bytes:
    """The file with a changed header whose checksum is right; data as before."""
    length = int.from_bytes(blob[:8], "little")
    outer = json.loads(blob[8 : 8 + length])
    about = json.loads(outer["__metadata__"]["featherweight"])
    change(outer, about)
    if not raw:
        outer["__metadata__"]["featherweight"] = json.dumps(about)
    return seal(json.dumps(outer, separators=(",", ":")), blob[8 + length :])


def seal(text: str, data: bytes) -> bytes:
    head = text.encode()
    prefix = len(head).to_bytes(8, "little")
    assert head.startswith(BEGIN)
    digits = b"%08x" % zlib.crc32(head[len(BEGIN) + 8 :], zlib.crc32(prefix))
    return prefix + BEGIN + digits + head[len(BEGIN) + 8 :] + data


def test_a_forged_header_with_nothing_changed_is_read(path: Path) -> None:
    """Shows that the cases below are refused for what they change."""
    before = load_file(path)
    path.write_bytes(forge(path.read_bytes(), lambda outer, about: None))
    after = load_file(path)
    assert before[1] == after[1] == {"alias": "csr"}
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])


def claim(name: str, item: int, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda outer, about: about["tensors"][name].__setitem__(item, value)


def part(name: str, key: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda outer, about: outer[name].__setitem__(key, value)


def about(key: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    return lambda outer, about: about.__setitem__(key, value)


FORGED = {
    "a newer version": (about("version", 2), "version 2 .* install"),
    "true for one": (about("version", True), "version True"),
    "no ties": (lambda outer, about: about.pop("ties"), "ties"),
    "an unknown key": (about("more", 1), "nothing else"),
    "more metadata": (lambda outer, about: outer["__metadata__"].update(format="pt"), "nothing else"),
    "a tie to nothing": (about("ties", {"alias": "gone"}), "alias"),
    "a tie of a tensor": (about("ties", {"n": "csr"}), "tie 'n'"),
    "a tie to a list": (about("ties", {"alias": []}), "alias"),
    "an unknown codec": (claim("n", 0, "huffman:8"), "unknown codec 'huffman:8'"),
    "a codec that is no string": (claim("n", 0, 5), "unknown codec"),
    "parameters of dense": (claim("n", 0, "dense:fp32"), "does not go with"),
    "parameters of bitmask": (claim("bitmask", 0, "bitmask:1"), "mask"),
    "no bits": (claim("csr", 0, "csr:0"), "from 1 to 16"),
    "17 bits": (claim("csr", 0, "csr:17"), "from 1 to 16"),
    "other bits": (claim("csr", 0, "csr:16"), "offsets"),
    "a second spelling of the bits": (claim("csr", 0, "csr:05"), "from 1 to 16"),
    "other groups": (claim("nm", 0, "nm:2:8:1"), "nm:2:8:1"),
    "groups of none": (claim("nm", 0, "nm:0:4:1"), "nm:0:4:1"),
    "groups along a missing axis": (claim("nm", 0, "nm:2:4:2"), "axis"),
    "an unknown type": (claim("n", 1, "float128"), "float128"),
    "another type": (claim("n", 1, "float64"), "not stored as"),
    "a huge tensor from a small mask": (claim("bitmask", 2, [1 << 40]), "takes 137438953472 bytes"),
    "a huge tensor from a few entries": (claim("csr", 2, [1 << 40]), "cannot stand for"),
    "fewer words than entries": (claim("csr", 2, [3]), "cannot stand for"),
    "fewer words than ones": (claim("bitmask", 2, [3]), "mask of 3 words"),
    "a huge dense tensor": (claim("half", 2, [1 << 40]), "shape"),
    "a huge tensor in groups": (claim("nm", 2, [1 << 40, 8]), "has values"),
    "a shape beyond all memory": (claim("csr", 2, [1 << 40, 1 << 40]), "no tensor has such a shape"),
    "axes beyond all memory beside an empty one": (claim("n", 2, [0, 1 << 60]), "no tensor has such a shape"),
    "a bool for a size": (claim("half", 2, [True, 3]), "integers"),
    "a negative size": (claim("half", 2, [-1, -3]), "integers"),
    "too many axes": (claim("n", 2, [1] * 65), "65 axes"),
    "a shape that is no list": (claim("n", 2, "abc"), "integers"),
    "a checksum of 33 bits": (claim("n", 3, 1 << 32), "no checksum"),
    "a checksum of another file": (claim("n", 3, 7), "tensor 'n': its checksum"),
    "an item less": (lambda outer, about: about["tensors"]["n"].pop(), "four items"),
    "a missing part": (lambda outer, about: about["tensors"].update(x=["dense:fp32", "float32", [3], 0]), "missing"),
    "a part of no tensor": (lambda outer, about: about["tensors"].pop("n"), "belongs to no tensor"),
    "an overlap": (part("half", "data_offsets", [0, 6]), "begins at byte"),
    "a part outside": (part("half", "data_offsets", [1 << 40, (1 << 40) + 6]), "begins at byte|end at byte"),
    "offsets backwards": (part("half", "data_offsets", [6, 0]), "bytes"),
    "three offsets": (part("half", "data_offsets", [0, 0, 6]), "bytes"),
    "a part larger than its bytes": (part("half", "shape", [1 << 40]), "bytes"),
    "a part of an unknown type": (part("half", "dtype", "F4"), "F4"),
    "a part whose type is a list": (part("half", "dtype", []), "unknown type"),
    "another type of the same size": (part("csr:values", "dtype", "I32"), "not stored as"),
    "offsets that are no bytes": (part("csr:offsets", "dtype", "BOOL"), "offsets"),
    "more of a part": (lambda outer, about: outer["half"].update(x=1), "nothing else"),
    "a part that is a number": (lambda outer, about: outer.update(half=3), "nothing else"),
}


@pytest.mark.parametrize("case", FORGED)
def test_claims_that_the_file_does_not_bear_out_are_refused_unallocated(path: Path, case: str) -> None:
    change, reason = FORGED[case]
    blob = forge(path.read_bytes(), change)
    tracemalloc.start()
    refused(path, blob, reason)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000
    if "checksum" not in reason:
        with pytest.raises(ArtefactError, match=reason):
            read_header(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 200_000, "JSON"),
        ('{"a":' * 100_000, "JSON"),
        ('{"a":1,"a":1}', "twice"),
        ('{"version":1.0}', "no integer"),
        ('{"version":NaN}', "no integer"),
        ('{"version":' + "9" * 25 + "}", "25 digits"),
        ("[]", "not an object"),
        ("", "JSON"),
        ('"\\ud800"', "not an object"),
    ],
    ids=["nested lists", "nested objects", "twice", "float", "nan", "huge", "list", "empty", "string"],
)
def test_json_that_is_no_plain_object_is_refused(path: Path, text: str, reason: str) -> None:
    blob = path.read_bytes()
    refused(path, forge(blob, lambda outer, about: outer["__metadata__"].update(featherweight=text), raw=True), reason)
    length = int.from_bytes(blob[:8], "little")
    if text.startswith(("{", "[")):
        head = '{"__metadata__":{"crc32":"00000000","featherweight":"{}"},"x":' + text + "}"
        refused(path, seal(head, blob[8 + length :]))


def test_header_bytes_that_are_no_unicode_are_refused(path: Path) -> None:
    head = BEGIN + b'00000000","featherweight":"\xff"}}'
    prefix = len(head).to_bytes(8, "little")
    digits = b"%08x" % zlib.crc32(head[len(BEGIN) + 8 :], zlib.crc32(prefix))
    refused(path, prefix + BEGIN + digits + head[len(BEGIN) + 8 :], "JSON")


def reseal_data(blob: bytes, name: str, suffix: str, data: bytes) -> bytes:
    """Other data of the same length in one part, with the tensor's checksum made right."""
    length = int.from_bytes(blob[:8], "little")
    outer = json.loads(blob[8 : 8 + length])
    body = bytearray(blob[8 + length :])
    start, stop = outer[f"{name}:{suffix}"]["data_offsets"]
    assert stop - start == len(data)
    body[start:stop] = data
    crc32 = 0
    for key in (suffix, "values"):
        start, stop = outer[f"{name}:{key}"]["data_offsets"]
        crc32 = zlib.crc32(body[start:stop], crc32)
    return forge(blob[: 8 + length] + bytes(body), claim(name, 3, crc32))


@pytest.mark.parametrize(
    ("name", "suffix", "fill", "reason"),
    [
        ("csr", "offsets", 0xFF, "lead to word"),
        ("csr", "offsets", 0x00, "too early"),
        ("bitmask", "mask", 0xFF, "more ones"),
        ("bitmask", "mask", 0x00, "0 ones"),
        ("nm", "positions", 0xFF, "no number 7"),
    ],
)
def test_contents_that_contradict_the_header_are_refused_with_right_checksums_too(
    path: Path, name: str, suffix: str, fill: int, reason: str
) -> None:
    blob = path.read_bytes()
    outer = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    start, stop = outer[f"{name}:{suffix}"]["data_offsets"]
    refused(path, reseal_data(blob, name, suffix, bytes([fill]) * (stop - start)), reason)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("unpickled"),)


def foreign() -> dict[str, bytes]:
    checkpoint = io.BytesIO()
    torch.save({"w": torch.ones(3)}, checkpoint)
    return {
        "nothing": b"",
        "text": b"weights: none\n" * 10,
        "zeros": bytes(1000),
        "torch.save": checkpoint.getvalue(),
        "pickle": pickle.dumps(Bomb()),
        "safetensors": safetensors.torch.save({"w": torch.ones(3)}),
        "safetensors that begin as ours do": safetensors.torch.save({"w": torch.ones(3)}, {"crc32": "00000000"}),
    }


@pytest.mark.parametrize("kind", foreign())
def test_foreign_files_are_refused_and_never_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(
        tmp_path / "f", foreign()[kind], "no safetensors|not written by featherweight|cut short, or foreign|checksum"
    )
    assert not (tmp_path / "unpickled").exists()


def test_a_tensor_that_memory_cannot_hold_is_refused_by_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch raises without memory is shown first; a file that claims so much is too large to make here."""
    with pytest.raises(MemoryError):
        blank(1 << 50, 8)
    monkeypatch.setattr(csr, "blank", lambda count, size: blank(1 << 50, 8))
    with pytest.raises(ArtefactError, match="tensor 'csr': no memory for 2400 bytes"):
        load_file(path)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    for wrong in (tmp_path / "gone", tmp_path):
        with pytest.raises(ArtefactError, match=re.escape(str(wrong))):
            load_file(wrong)
        with pytest.raises(ArtefactError, match="could not be read"):
            read_header(wrong)


F32 = torch.float32


@pytest.mark.parametrize(
    ("expect", "reason"),
    [
        ({"fc.weight": ((4, 3), F32), "fc.bias": ((4,), F32)}, None),
        ({"fc.weight": ((4, 3), F32), "fc.bias": ((4,), F32), "head": ((4, 3), F32)}, None),
        ({"fc.weight": (torch.Size([4, 3]), F32), "fc.bias": (torch.Size([4]), F32)}, None),
        ({"fc.weight": ((3, 4), F32), "fc.bias": ((4,), F32)}, r"'fc.weight' is float32 \[4, 3\].*float32 \[3, 4\]"),
        ({"fc.weight": ((4, 3), torch.float16), "fc.bias": ((4,), F32)}, "float16"),
        ({"fc.weight": ((4, 3), F32), "fc.bias": ((4,), F32), "head": ((4,), F32)}, "'head'"),
        ({"fc.weight": ((4, 3), F32)}, "'fc.bias' that the model has not"),
        ({"fc.weight": ((4, 3), F32), "fc.bias": ((4,), F32), "fc.scale": ((1,), F32)}, "'fc.scale' is not in it"),
        ({}, "that the model has not"),
    ],
)
def test_a_file_that_does_not_fit_the_model_is_refused_by_its_header(
    tmp_path: Path, expect: dict[str, Any], reason: str | None
) -> None:
    tensors = {"fc.weight": random_tensor(F32, (4, 3), 0.5, 0), "fc.bias": torch.ones(4)}
    save_file(tmp_path / "f", tensors, ties={"head": "fc.weight"})
    if reason is None:
        assert set(load_file(tmp_path / "f", expect)[0]) == set(tensors)
        return
    blob = bytearray((tmp_path / "f").read_bytes())
    blob[-1] ^= 1  # the values are damaged too: had they been read first, the reason would be another
    (tmp_path / "f").write_bytes(blob)
    with pytest.raises(ArtefactError, match=reason):
        load_file(tmp_path / "f", expect)
