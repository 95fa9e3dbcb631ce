# SPDX-License-Identifier: Apache-2.0
"""A reader written from docs/file-format.md in plain Python: no NumPy, no torch, none of featherweight's code.

Slow and simple on purpose. Words are Python integers, bit streams are one big integer.
"""

import itertools
import json
import math
import struct
import zlib

SIZE = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8, "F16": 2, "BF16": 2}
SIZE |= {"F32": 4, "F64": 8, "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1}

PARTS = {"bitmask": (":mask", ":values"), "csr": (":offsets", ":values"), "nm": (":positions", ":values")}
PARTS |= {"int": (":integers", ":scale"), "codebook": (":indices", ":codebook")}


def fields(data: bytes, width: int, count: int) -> list[int]:
    stream = int.from_bytes(data, "little")
    return [stream >> (i * width) & ((1 << width) - 1) for i in range(count)]


def stored_words(data: bytes, code: str, dtype: str) -> list[int]:
    """The words of a part; float32 values that are stored as F16 or BF16 come back as float32 words."""
    size = SIZE[code]
    found = [int.from_bytes(data[i : i + size], "little") for i in range(0, len(data), size)]
    if dtype == "float32" and code == "BF16":
        return [word << 16 for word in found]
    if dtype == "float32" and code == "F16":
        return [struct.unpack("<I", struct.pack("<f", *struct.unpack("<e", struct.pack("<H", w))))[0] for w in found]
    return found


def decode_bitmask(length: int, mask: bytes, values: list[int]) -> list[int]:
    queue = iter(values)
    return [next(queue) if bit else 0 for bit in fields(mask, 1, length)]


def decode_csr(length: int, bits: int, offsets: bytes, values: list[int]) -> list[int]:
    out: list[int] = []
    for offset, value in zip(fields(offsets, bits, len(values)), values, strict=True):
        out += [0] * offset + [value]
    assert 0 <= length - len(out) < 1 << bits
    return out + [0] * (length - len(out))


def decode_nm(shape: list[int], n: int, m: int, axis: int, positions: bytes, values: list[int]) -> list[int]:
    patterns = sorted(sum(1 << bit for bit in chosen) for chosen in itertools.combinations(range(m), n))
    width = math.ceil(math.log2(len(patterns)))
    groups = -(-shape[axis] // m)
    inner, outer = math.prod(shape[axis + 1 :]), math.prod(shape[:axis])
    numbers = fields(positions, width, outer * groups * inner)
    out = [0] * math.prod(shape)
    for o, g, c in itertools.product(range(outer), range(groups), range(inner)):
        pattern = patterns[numbers[(o * groups + g) * inner + c]]
        ones = [j for j in range(m) if pattern >> j & 1]
        for i, j in enumerate(ones):
            value = values[((o * groups + g) * n + i) * inner + c]
            if g * m + j < shape[axis]:
                out[(o * shape[axis] + g * m + j) * inner + c] = value
            else:
                assert value == 0
    return out


def as_float(word: int, code: str) -> float:
    """The number of a scale, stored as F32, F16 or BF16."""
    return struct.unpack(
        "<f", struct.pack("<I", stored_words(word.to_bytes(SIZE[code], "little"), code, "float32")[0])
    )[0]


def rounded(value: float, dtype: str) -> int:
    """The word of a product, exact in a Python float: by way of float32 unless the tensor is of float64."""
    if dtype == "float64":
        return int.from_bytes(struct.pack("<d", value), "little")
    single = struct.pack("<f", value)
    if dtype == "float32":
        return int.from_bytes(single, "little")
    if dtype == "float16":
        return int.from_bytes(struct.pack("<e", *struct.unpack("<f", single)), "little")
    word = int.from_bytes(single, "little")
    return (word + 0x7FFF + (word >> 16 & 1)) >> 16  # bfloat16: to nearest, ties to even


def pieces(shape: list[int], layout: str) -> list[int]:
    """For each element in C order, the number of its scale."""
    if layout == "all":
        return [0] * math.prod(shape)
    way, _, chunk = layout.partition("/")
    axis, _, groups = way.partition("x")
    places = list(itertools.product(*map(range, shape)))
    rows = {}
    for place in places:
        if axis == "0":
            rows[place] = (place[0],), (*place[2:], place[1])
        else:
            each = shape[0] // int(groups or 1)
            rows[place] = (place[0] // each, place[1]), (*place[2:], place[0] % each)
    columns = sorted({column for _, column in rows.values()})
    column_of = {column: i // int(chunk or len(columns)) for i, column in enumerate(columns)}
    keys = {place: (row, column_of[column]) for place, (row, column) in rows.items()}
    number = {key: i for i, key in enumerate(sorted(set(keys.values())))}
    return [number[keys[place]] for place in places]


def decode_int(shape: list[int], dtype: str, params: list[str], integers: bytes, scales: list[float]) -> list[int]:
    bits, shifted = int(params[0]), params[2:] == ["z"]
    length = math.prod(shape)
    found = fields(integers, bits, length + shifted * len(scales))
    zero_points = found[: len(scales)] if shifted else [1 << (bits - 1)] * len(scales)
    found = found[len(scales) :] if shifted else found
    numbers = pieces(shape, params[1])
    if bits == 1:
        return [rounded(scales[i] * (2 * q - 1), dtype) for q, i in zip(found, numbers, strict=True)]
    return [rounded(scales[i] * (q - zero_points[i]), dtype) for q, i in zip(found, numbers, strict=True)]


def read(blob: bytes) -> tuple[dict[str, tuple[str, list[int], list[int]]], dict[str, str]]:
    """Type, shape and words of each tensor, and the ties."""
    length = int.from_bytes(blob[:8], "little")
    text, data = blob[8 : 8 + length], blob[8 + length :]
    begin = b'{"__metadata__":{"crc32":"'
    assert text.startswith(begin)
    digits = text[len(begin) : len(begin) + 8]
    assert int(digits, 16) == zlib.crc32(blob[:8] + text[len(begin) + 8 :])
    header = json.loads(text)
    about = json.loads(header.pop("__metadata__")["featherweight"])
    assert about["version"] == 1

    def part(name: str) -> bytes:
        start, stop = header[name]["data_offsets"]
        assert start % SIZE[header[name]["dtype"]] == 0  # aligned, as the page promises
        return data[start:stop]

    found = {}
    for name, (codec, dtype, shape, crc32) in about["tensors"].items():
        kind, *params = codec.split(":")
        first, last = PARTS.get(kind, ("", ""))
        code = header[name + last]["dtype"]
        values = stored_words(part(name + last), code, "" if kind == "int" else dtype)
        assert zlib.crc32((part(name + first) if first else b"") + part(name + last)) == crc32
        words = math.prod(shape) * (2 if dtype == "complex128" else 1)
        if kind == "bitmask":
            values = decode_bitmask(words, part(name + first), values)
        elif kind == "csr":
            values = decode_csr(words, int(params[0]), part(name + first), values)
        elif kind == "nm":
            values = decode_nm(shape, *map(int, params), part(name + first), values)
        elif kind == "int":
            scales = [as_float(value, code) for value in values]
            values = decode_int(shape, dtype, params, part(name + first), scales)
        elif kind == "codebook":
            indices = fields(part(name + first), max(1, (len(values) - 1).bit_length()), words)
            values = [values[index] for index in indices]
        assert len(values) == words
        found[name] = dtype, shape, values
    return found, about["ties"]
