# SPDX-License-Identifier: Apache-2.0
"""Saving: whole or not at all, under any name, one tensor in memory at a time, at a useful speed."""

import os
import resource
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from featherweight.errors import ArtefactError
from featherweight.pack import bitmask, load_file, read_header, save_file
from featherweight.pack.codecs import CODECS
from tests.pack.samples import FLOATS, only

OLD = {"w": torch.arange(5)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An older file, alone in its folder."""
    save_file(tmp_path / "model.safetensors", OLD)
    return tmp_path / "model.safetensors"


def stands(path: Path) -> None:
    """The older file is what it was, and nothing lies beside it."""
    assert torch.equal(load_file(path)[0]["w"], OLD["w"])
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("limit", [100, 2_000_000])
def test_a_full_disk_is_an_error_and_the_older_file_stands(path: Path, limit: int) -> None:
    """A limit on the size of files stands in for the full disk: it is met in the parts, or in the file's last byte."""
    dense = {"w": torch.rand(500_000)}  # 2,000,000 bytes of parts, and a header
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(ArtefactError, match=r"could not be written.*unchanged"):
            save_file(path, dense)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    stands(path)


class Interrupted(Mapping[str, Tensor]):
    """A second tensor that never comes."""

    def __getitem__(self, name: str) -> Tensor:
        if name == "b":
            raise KeyboardInterrupt
        return torch.rand(100)

    def __iter__(self) -> Iterator[str]:
        return iter(["a", "b"])

    def __len__(self) -> int:
        return 2


def test_an_interrupted_save_leaves_nothing(path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        save_file(path, Interrupted())
    stands(path)


@pytest.mark.parametrize(
    ("tensors", "ties", "reason"),
    [
        ({"w": torch.zeros(2, device="meta")}, {}, "w is a meta tensor"),
        ({"w": torch.zeros(2, 2).to_sparse()}, {}, "sparse_coo"),
        ({"w": torch.empty(2, dtype=torch.int4)}, {}, "int4"),
        ({"w": torch.zeros([1] * 65)}, {}, "65 axes"),
        ({"__metadata__": torch.ones(1)}, {}, "__metadata__"),
        ({"\ud800": torch.ones(1)}, {}, "Unicode"),
        ({"w": torch.ones(1)}, {"v": "u"}, "'v' -> 'u'"),
        ({"w": torch.ones(1), "v": torch.ones(1)}, {"v": "w"}, "'v' -> 'w'"),
    ],
)
def test_what_cannot_be_packed_is_said_and_the_older_file_stands(
    path: Path, tensors: dict[str, Tensor], ties: dict[str, str], reason: str
) -> None:
    with pytest.raises(ArtefactError, match=reason) as caught:
        save_file(path, tensors, ties=ties)
    assert str(path) in str(caught.value)
    stands(path)


def test_paths_that_cannot_be_written_are_named(path: Path) -> None:
    for wrong in (path.parent / "gone" / "f", path / "f", path.parent):
        with pytest.raises(ArtefactError, match="could not be written"):
            save_file(wrong, OLD)
    stands(path)


def test_a_new_file_takes_the_old_ones_place_and_has_the_usual_permissions(path: Path) -> None:
    """Whoever has the old file open goes on reading the old one: it was replaced, not written over."""
    old = path.read_bytes()
    with open(path, "rb") as still_open:
        save_file(path, {"v": torch.ones(2)})
        assert still_open.read() == old
    plain = path.with_name("plain")
    plain.touch()
    assert list(load_file(path)[0]) == ["v"]
    assert path.stat().st_mode == plain.stat().st_mode


def test_ties_are_kept_and_the_values_stand_once(path: Path) -> None:
    save_file(path, {"embed": torch.rand(10, 4)}, ties={"head": "embed", "copy": "embed"})
    tensors, ties = load_file(path)
    assert list(tensors) == ["embed"]
    assert ties == {"head": "embed", "copy": "embed"} == read_header(path)[1]


def test_saving_twice_gives_the_same_bytes(path: Path) -> None:
    tensors = {"b": torch.eye(70), "a": torch.rand(9), "n": torch.tensor(1)}
    save_file(path, tensors)
    first = path.read_bytes()
    save_file(path, tensors)
    assert path.read_bytes() == first


def test_no_tensors_make_a_file_too(path: Path) -> None:
    save_file(path, {})
    assert load_file(path) == ({}, {})


@only(*FLOATS)
def test_a_tensor_that_is_named_as_anothers_part_pushes_that_one_aside(path: Path) -> None:
    sparse = torch.eye(64) * 0.1
    tensors = {"w": sparse, "w:values": sparse * 2, "w:values:offsets": torch.ones(1), 'q"\\:mask\n': torch.ones(2)}
    coded = save_file(path, tensors)
    assert coded["w"].codec == "dense:fp32"
    loaded, _ = load_file(path)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


@only(*FLOATS)
def test_a_codec_is_one_entry_and_one_that_errs_is_passed_over(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The promise to whoever adds a codec, and to whoever uses it: its decoding is compared before it is trusted."""
    sparse = torch.eye(64) * 0.1

    def add(name: str, decode: object) -> None:
        codec = SimpleNamespace(
            PARTS=bitmask.PARTS,
            propose=lambda source, hint: iter([("", 5)]),
            encode=bitmask.encode,
            check=bitmask.check,
            decode=decode,
        )
        monkeypatch.setitem(CODECS, name, codec)

    add("wrong", lambda spec, params, parts: bitmask.decode(spec, params, parts) + 1)
    assert save_file(path, {"w": sparse})["w"].codec.startswith("csr")
    add("fine", bitmask.decode)
    assert save_file(path, {"w": sparse})["w"].codec == "fine"
    assert torch.equal(load_file(path)[0]["w"], sparse)
    monkeypatch.delitem(CODECS, "fine")
    with pytest.raises(ArtefactError, match="unknown codec 'fine'"):
        load_file(path)


MEMORY = """
    import resource, sys, tempfile, torch
    from featherweight.pack import load_file, save_file

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

    torch.set_num_threads(1)
    tensors = {str(i): torch.rand(4_000_000) + 0.01 for i in range(8)}  # 8 x 16 MB
    for i, tensor in enumerate(tensors.values()):
        tensor[torch.rand(4_000_000) < (0.0, 0.5, 0.9, 0.99)[i % 4]] = 0
    start = peak()
    with tempfile.TemporaryDirectory() as folder:
        save_file(folder + "/f", tensors)
        saved = peak()
        loaded, _ = load_file(folder + "/f")
    print(saved - start, peak() - saved - 8 * 16)
"""


def test_saving_and_loading_take_memory_for_tensors_not_for_models() -> None:
    """Eight tensors of 16 MB: beyond them, and beyond what loading returns, never more than two and a half such."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory goes back at once and is not counted
    command = [sys.executable, "-c", textwrap.dedent(MEMORY)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=environment)
    saving, loading = map(int, done.stdout.split())
    assert saving < 2.5 * 16
    assert loading < 2.5 * 16


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_coding_and_decoding_do_50_megabytes_of_processor_time_a_second(tmp_path: Path, sparsity: float) -> None:
    """Half of what is promised, for busy machines; benchmarks/pack_speed.py measures it."""
    tensor = torch.randn(3_000_000, generator=torch.Generator().manual_seed(0))
    tensor[torch.rand(3_000_000, generator=torch.Generator().manual_seed(1)) < sparsity] = 0
    saving, loading = [], []
    for _ in range(3):
        start = time.process_time()
        save_file(tmp_path / "f", {"w": tensor})
        between = time.process_time()
        load_file(tmp_path / "f")
        saving.append(between - start)
        loading.append(time.process_time() - between)
    assert tensor.nbytes / 1e6 / min(saving) > 50
    assert tensor.nbytes / 1e6 / min(loading) > 50
