# SPDX-License-Identifier: Apache-2.0
"""Bit streams against one big Python integer."""

import numpy as np
import pytest

from featherweight.pack.bits import bytes_of, pack_fields, unpack_fields


@pytest.mark.parametrize("width", range(1, 17))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 63, 70_001])
def test_fields_are_the_digits_of_one_number_in_base_two_to_the_width(width: int, count: int) -> None:
    fields = np.random.default_rng(width).integers(0, 1 << width, count, dtype=np.uint16)
    packed = pack_fields(fields, width)
    assert len(packed) == bytes_of(count, width) == (count * width + 7) // 8
    if count < 100:
        number = sum(int(field) << (i * width) for i, field in enumerate(fields))
        assert int.from_bytes(packed.tobytes(), "little") == number
    else:  # the same by NumPy's own bit streams
        stream = np.unpackbits(packed, bitorder="little")[: count * width].reshape(count, width)
        assert np.array_equal(stream @ (1 << np.arange(width)), fields)
    assert np.array_equal(unpack_fields(packed, count, width), fields)
