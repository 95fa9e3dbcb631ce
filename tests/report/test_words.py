"""Numbers as words: what is written says the number to the digits shown, and never says more."""

import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from featherweight.report import words

UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}


@given(st.integers(1, 10**14))
def test_a_size_reads_back_to_half_a_percent_and_has_three_digits(n: int) -> None:
    shown, unit = words.size(n).split(" ")
    assert float(shown) * UNITS[unit] == pytest.approx(n, rel=0.0051)
    assert len(re.sub(r"\D", "", shown).lstrip("0")) <= 3


@pytest.mark.parametrize(
    ("n", "said"), [(99_960, "100 kB"), (999_499, "999 kB"), (999_500, "1.00 MB"), (9_996, "10.0 kB")]
)
def test_rounding_carries_into_the_next_digit_and_unit(n: int, said: str) -> None:
    assert words.size(n) == said


@given(st.integers(0, 10**17))
def test_a_count_is_exact_below_a_million_and_reads_back_above(n: int) -> None:
    shown, _, unit = words.count(n).partition(" ")
    value = float(shown.replace(",", "")) * UNITS[unit]
    assert value == n if n < 10**6 else value == pytest.approx(n, rel=0.0051)


@given(st.floats(0, 1))
@example(0.99996)
@example(0.00002)
def test_a_share_is_never_called_all_or_nothing_unless_it_is(share: float) -> None:
    shown = words.percent(share)
    assert (shown == "100 %") == (share == 1) and (shown == "0 %") == (share == 0)
    assert "100" not in shown or share == 1
    assert abs(float(re.sub(r"[^\d.]", "", shown)) - share * 100) <= 0.1


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [(1_234_567, 143_207, "8.6x smaller"), (100, 250, "2.5x larger"), (7, 7, "same"), (0, 7, ""), (None, 7, ""), (105, 100, "1.05x smaller")],
)  # fmt: skip
def test_a_change_is_a_factor_and_a_direction(before: Any, after: Any, said: str) -> None:
    assert words.change(before, after) == said


@pytest.mark.parametrize(("given_", "said"), [(59.94, "59.9 s"), (119.6, "2 min 0 s"), (3599.7, "1 h 0 min"), (0.0123, "0.0123 s")])  # fmt: skip
def test_durations_carry_over(given_: float, said: str) -> None:
    assert words.seconds(given_) == said


@pytest.mark.parametrize(
    "say", [words.count, words.size, words.milliseconds, words.seconds, words.percent, words.figure, words.metric]
)
def test_what_is_no_number_says_so_and_never_fails(say: Any) -> None:
    assert say(None) == "–" and say(math.nan) == "NaN" and say(math.inf) == "∞" and say("n/a") == "n/a"
    for extreme in (0, -0.0, 5e-324, -1e308, 1e308, 10**400, True, [], np.float32(0.5), np.int64(3)):
        assert isinstance(say(extreme), str)
