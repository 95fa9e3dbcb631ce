# SPDX-License-Identifier: Apache-2.0
"""A binary range coder: decisions and their probabilities as a number, with carries (Martin 1979), in plain Python.

48 bits of state and words of 16, so that the interval never narrows below 2^32 and a decision loses less than a
ten-thousandth of a bit. One function gives the decisions and takes them back: a model that is written once, around
`flip`, codes and decodes.
"""

from __future__ import annotations

from collections.abc import Callable

from featherweight.errors import ArtefactError

__all__ = ["decoder", "encoder"]

Flip = Callable[[int, int], int]

_TOP, _LOW = 1 << 48, 1 << 32


def encoder() -> tuple[Flip, Callable[[], bytes]]:
    """`flip(chance, bit)` codes and returns a bit whose chance to be 1 is `chance` / 65536; `finish()` gives the bytes.

    >>> flip, finish = encoder()
    >>> bits = [flip(60000, bit) for bit in (1, 1, 0, 1, 1, 1)]
    >>> coded = finish()
    >>> flip, finish = decoder(coded)
    >>> len(coded), [flip(60000, 0) for _ in bits]
    (1, [1, 1, 0, 1, 1, 1])
    """
    low, width = 0, _TOP - 1
    words: list[int] = []

    def push() -> None:
        nonlocal low
        if low >= _TOP:
            low -= _TOP
            at = len(words) - 1
            while words[at] == 0xFFFF:
                words[at] = 0
                at -= 1
            words[at] += 1
        words.append(low >> 32)
        low = (low & (_LOW - 1)) << 16

    def flip(chance: int, bit: int) -> int:
        nonlocal low, width
        bound = (width >> 16) * chance
        if bit:
            width = bound
        else:
            low += bound
            width -= bound
        while width < _LOW:
            push()
            width <<= 16
        return bit

    def finish() -> bytes:
        nonlocal low
        # The number of the last interval that ends in most zeros; a decoder reads zeros beyond the end.
        for places in range(48, -1, -8):
            number = -(-low >> places) << places
            if number < low + width:
                break
        low = number
        for _ in range(3):
            push()
        return b"".join(word.to_bytes(2, "big") for word in words).rstrip(b"\0")

    return flip, finish


def decoder(data: bytes) -> tuple[Flip, Callable[[], None]]:
    """`flip(chance, 0)` gives the next bit; `finish()` raises `ArtefactError` where the bytes hold more, or less."""
    at, width = 6, _TOP - 1
    number = int.from_bytes(data[:6].ljust(6, b"\0"), "big")

    def flip(chance: int, bit: int) -> int:
        nonlocal at, width, number
        bound = (width >> 16) * chance
        if number < bound:
            width = bound
            bit = 1
        else:
            number -= bound
            width -= bound
            bit = 0
        while width < _LOW:
            number = number << 16 | int.from_bytes(data[at : at + 2].ljust(2, b"\0"), "big")
            at += 2
            width <<= 16
        return bit

    def finish() -> None:
        if at < len(data) or data.endswith(b"\0"):
            raise ArtefactError("the adaptively coded data go on behind their last decision")

    return flip, finish
