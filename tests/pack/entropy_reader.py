# SPDX-License-Identifier: Apache-2.0
"""The part of an entropy-coded tensor, read as docs/file-format.md says, in plain Python; none of featherweight's code."""

from decimal import Decimal, getcontext
from functools import cache

getcontext().prec = 40

TABLE_TYPES = {0: ("F32", 4), 1: ("F16", 2), 2: ("BF16", 2), 3: ("F64", 8)}


class Bytes:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        assert self.at + count <= len(self.data)
        self.at += count
        return self.data[self.at - count : self.at]

    def varint(self) -> int:
        value, shift = 0, 0
        while True:
            [byte] = self.take(1)
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def fields(self, width: int, count: int) -> list[int]:
        stream = int.from_bytes(self.take(-(-width * count // 8)), "little")
        return [stream >> (i * width) & ((1 << width) - 1) for i in range(count)]


def read(data: bytes, coder: str, shape: list[int]) -> tuple[str, bytes, list[int]]:
    """Type and bytes of the table, and the numbers."""
    source = Bytes(data)
    version, code = source.take(2)
    assert version == 1
    name, size = TABLE_TYPES[code]
    table = source.take(source.varint() * size)
    count = 1
    for axis in shape:
        count *= axis
    if coder == "adaptive":
        return name, table, adaptive(source, count, count // shape[0] if len(shape) > 1 else count)
    [form] = source.take(1)
    if form == 0:
        numbers = [signed(value) for value in stream(source, coder, count, count)]
    else:
        stored = source.varint()
        runs = stream(source, coder, stored, count)
        values = stream(source, coder, stored, count)
        numbers = []
        for run, value in zip(runs, values, strict=True):
            numbers += [0] * run + [signed(value + 1)]
        numbers += [0] * (count - len(numbers))
    assert source.at == len(data)
    assert len(numbers) == count
    return name, table, numbers


def signed(value: int) -> int:
    return (value + 1) // 2 if value % 2 else -(value // 2)


def stream(source: Bytes, coder: str, count: int, words: int) -> list[int]:
    steps = max(1024, words // 256)
    lanes = 1
    while lanes * steps < count and lanes < 4096:
        lanes *= 2
    [split] = source.take(1)
    size = source.varint()
    table = source.fields(4 if coder == "huffman" else 6, size)
    coded = source.take(source.varint())
    tokens = (huffman if coder == "huffman" else rans)(coded, table, count, lanes)
    bits = [(token - 2**split) // 4 + split - 2 if token >= 2**split else 0 for token in tokens]
    values = [
        token if token < 2**split else (4 + (token - 2**split) % 4) << width
        for token, width in zip(tokens, bits, strict=True)
    ]
    for width in range(1, max(bits, default=0) + 1):
        places = [i for i, w in enumerate(bits) if w == width]
        low = 0
        while low < width:
            for i, field in zip(places, source.fields(min(16, width - low), len(places)), strict=True):
                values[i] += field << low
            low += 16
    return values


def huffman(coded: bytes, lengths: list[int], count: int, lanes: int) -> list[int]:
    codes, code, last = {}, 0, 0
    for length, symbol in sorted((length, symbol) for symbol, length in enumerate(lengths) if length):
        code <<= length - last
        codes[f"{code:0{length}b}"] = symbol
        code, last = code + 1, length
    words = [f"{int.from_bytes(coded[i : i + 2], 'little'):016b}"[::-1] for i in range(0, len(coded), 2)]
    buffers, at, out = words[:lanes], lanes, []
    for i in range(count):
        if i % lanes == 0:
            for lane in range(min(lanes, count - i)):
                if len(buffers[lane]) < 16:
                    buffers[lane] += words[at]
                    at += 1
        lane, length = i % lanes, 1
        while buffers[lane][:length] not in codes:
            length += 1
        out.append(codes[buffers[lane][:length]])
        buffers[lane] = buffers[lane][length:]
    assert at == len(words)
    return out


def rans(coded: bytes, levels: list[int], count: int, lanes: int) -> list[int]:
    frequencies = [round(2 ** ((level - 1) / 5)) if level else 0 for level in levels]
    total = sum(frequencies)
    scaled = [max(1, (f * 4096 + total // 2) // total) if f else 0 for f in frequencies]
    while total and (over := sum(scaled) - 4096):
        largest = scaled.index(max(scaled))
        scaled[largest] -= min(over, max(1, scaled[largest] // 2)) if over > 0 else over
    slots = [symbol for symbol, f in enumerate(scaled) for _ in range(f)]
    starts = [sum(scaled[:symbol]) for symbol in range(len(scaled))]
    states = [int.from_bytes(coded[4 * i : 4 * i + 4], "little") for i in range(lanes)]
    at, out = 4 * lanes, []
    for i in range(count):
        x = states[i % lanes]
        slot = x % 4096
        symbol = slots[slot]
        x = scaled[symbol] * (x // 4096) + slot - starts[symbol]
        if x < 2**16:
            x = x * 2**16 + int.from_bytes(coded[at : at + 2], "little")
            at += 2
        states[i % lanes] = x
        out.append(symbol)
    assert at == len(coded)
    assert states == [2**16] * lanes
    return out


@cache
def chance_of(place: int) -> int:
    exact = 65536 / (1 + (Decimal(-abs(place)) / 64).exp())
    chance = int(exact + Decimal("0.5"))
    return chance if place >= 0 else 65536 - chance


def adaptive(source: Bytes, count: int, columns: int) -> list[int]:
    period, shift, most = source.varint(), source.varint(), source.varint()
    data = source.take(len(source.data) - source.at)
    number, width, at = int.from_bytes(data[:6].ljust(6, b"\0"), "big"), 2**48 - 1, 6

    def flip(chance: int) -> int:
        nonlocal number, width, at
        bound = width // 65536 * chance
        bit = int(number < bound)
        if bit:
            width = bound
        else:
            number, width = number - bound, width - bound
        while width < 2**32:
            number = number * 65536 + int.from_bytes(data[at : at + 2].ljust(2, b"\0"), "big")
            width, at = width * 65536, at + 2
        return bit

    contexts: dict[object, list[float]] = {}

    def decide(*keys: tuple[object, float]) -> int:
        slots = [contexts.setdefault(key, [0.0, prior]) for key, prior in keys]
        total = slots[0][0]
        for slot in slots[1:]:
            total += slot[0]
        place = max(-672, min(672, int(total * 64)))
        chance = chance_of(place)
        bit = flip(chance)
        for slot in slots:
            slot[1] += chance * (65536 - chance) / 2**32
            slot[0] += 0.65 * (bit - chance / 65536) / slot[1]
        return bit

    out: list[int] = []
    sums, founds = [3.0] * columns, [1.0] * columns
    for row in range(count // max(1, columns)):
        levels: list[int] = []
        for j in range(columns):
            w, n, nw, ne, ww = (
                levels[j - d] if d > 0 and j >= d else 0 for d in (1, period, period + 1, period - 1, 2)
            )
            near = tuple(map(bool, (w, n, nw, ne)))
            if not decide((("0",), 0.5), (("0c", j), 0.7), (("0r", row), 1.0), (("0n", near), 0.7)):
                out.append(0)
                levels.append(0)
                continue
            s, t = sign(w), sign(n)
            weighed = 2 * (s + t) + sign(nw) + sign(ne) + sign(ww)
            positive = decide((("s",), 0.5), (("sn", s, t), 0.5), (("ss", weighed), 0.5), (("sr", row), 4.0))
            close = [min(7, abs(level)) for level in (w, n, nw, ne) if level]
            around = 1 + min(14, 2 * sum(close) // len(close)) if close else 0
            before = min(15, int(2 * sums[j] / founds[j]))
            level = 1
            while level < most and decide(
                (("m", min(level, 63), positive), 0.3),
                (("mc", before, min(level, 3)), 0.5),
                (("mr", row), 3.0),
                (("mn", around, min(level, 3)), 0.5),
            ):
                level += 1
            low = 0
            for _ in range(shift):
                low = 2 * low + flip(32768)
            sums[j] += level
            founds[j] += 1
            levels.append(level if positive else -level)
            magnitude = (level - 1) * 2**shift + low + 1
            out.append(magnitude if positive else -magnitude)
    assert at >= len(data)
    return out


def sign(value: int) -> int:
    return (value > 0) - (value < 0)
