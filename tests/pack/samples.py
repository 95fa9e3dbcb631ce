# SPDX-License-Identifier: Apache-2.0
"""Tensors to pack: random bit patterns of every type, with as many zeros as asked for and every odd value there is."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch

from featherweight.pack.codecs import CODECS

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64),
    *(torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    *(torch.complex32, torch.float4_e2m1fn_x2),
]

# -0.0, quiet and signalling NaNs with payloads, infinities, the smallest subnormal, and a number that fp16 cannot hold
ODD = [0x80000000, 0x7FC00001, 0xFFA00000, 0x7F800001, 0x7FC00000, 0x7F800000, 0xFF800000, 1, 0x47800000]


def bit_patterns(tensor: torch.Tensor) -> list[int]:
    """The tensor's elements as unsigned integers, in C order: what "equal to the last bit" compares."""
    size = min(tensor.dtype.itemsize, 8)
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return [int.from_bytes(data[i : i + size], "little") for i in range(0, len(data), size)]


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], sparsity: float, seed: int) -> torch.Tensor:
    """Random bits, NaNs and all, where not zero; for float32 a third of the seeds give fp16 or bf16 values only."""
    rng = np.random.default_rng(seed)
    count, size = int(np.prod(shape)), dtype.itemsize
    data = rng.integers(0, 2 if dtype == torch.bool else 256, (count, size), dtype=np.uint8)
    if dtype == torch.float32:
        flat = data.reshape(-1).view("<u4")
        flat[rng.random(count) < 0.2] = ODD[seed % len(ODD)]
        if seed % 6 == 1:
            flat &= 0xFFFF0000
        if seed % 6 == 2:
            with np.errstate(over="ignore"):
                flat[:] = np.nan_to_num(rng.standard_normal(count)).astype("<f2").astype("<f4").view("<u4")
    data[rng.random(count) < sparsity] = 0
    flat8 = torch.from_numpy(data.reshape(-1))
    if dtype == torch.complex128 and not count:
        return torch.empty(shape, dtype=dtype)
    return flat8.view(dtype).reshape(shape)


@contextlib.contextmanager
def only(*kinds: str) -> Iterator[None]:
    """Packing knows these codecs alone, for tests of one that another would be smaller than."""
    with mock.patch.dict(CODECS, {kind: CODECS[kind] for kind in kinds}, clear=True):
        yield


FLOATS = "dense", "bitmask", "csr", "nm"
"""The codecs that keep values as floating-point numbers."""
