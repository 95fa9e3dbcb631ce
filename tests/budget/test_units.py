# SPDX-License-Identifier: Apache-2.0
import pytest

from featherweight.budget import allowed_drop, limit_bytes
from featherweight.errors import OptionError


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [
        ("2 MB", 2_000_000),
        ("2MiB", 2 * 1024**2),
        (" 1.5 kB ", 1500),
        ("30 %", 3000),
        ("100%", 10_000),
        (77, 77),
        ("5 B", 5),
    ],
)
def test_sizes_are_absolute_or_the_share_kept(text: str | int, bytes_: int) -> None:
    assert limit_bytes(text, whole=10_000) == bytes_


@pytest.mark.parametrize("text", ["", "2", "2 mb", "0 %", "101 %", "-3 MB", "3x", 0, -1, True, None, 1.5])
def test_other_sizes_are_refused(text: object) -> None:
    with pytest.raises(OptionError, match="size"):
        limit_bytes(text, whole=10)  # type: ignore[arg-type]


def test_a_drop_is_in_the_metrics_units_or_a_share_of_its_start() -> None:
    assert allowed_drop(0.5, 80.0) == 0.5
    assert allowed_drop("1 %", -80.0) == pytest.approx(0.8)
    assert allowed_drop(0, 3.0) == 0
    for text in ("1", "x %", -0.1, "101 %", None):
        with pytest.raises(OptionError, match="drop"):
            allowed_drop(text, 1.0)  # type: ignore[arg-type]
