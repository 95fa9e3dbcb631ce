# SPDX-License-Identifier: Apache-2.0
"""Where the time of a run goes: what each step took, how it was carried out, and at what rate."""

from __future__ import annotations

import dataclasses
from typing import Any

__all__ = ["Profile", "Row"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One step. `flops` counts a multiply-add as two and no skipped zero; `bytes` what is read and written, once.

    `how` is the engine's own word: whether a product ran sparse or dense, with what tile, and the share of its zeros.
    Of a part in ONNX Runtime there is one row, with no flops.
    """

    node: str
    op: str
    how: str
    seconds: float
    flops: float
    bytes: float

    @property
    def gflops(self) -> float:
        """10^9 floating-point operations a second."""
        return self.flops / self.seconds / 1e9 if self.seconds else 0.0

    @property
    def gbytes(self) -> float:
        """10^9 bytes a second."""
        return self.bytes / self.seconds / 1e9 if self.seconds else 0.0


@dataclasses.dataclass(frozen=True)
class Profile:
    """Medians over `runs` runs: `rows` in the order of running, and `seconds` for a run as a whole.

    >>> profile = Profile((Row("conv", "Conv", "sparse", 0.003, 6e6, 3e6), Row("add", "Add", "", 0.001, 0, 1e6)), 0.005, 10)
    >>> print(profile)
     share      ms  GFLOP/s   GB/s  op    how     node
      60 %   3.000      2.0    1.0  Conv  sparse  conv
      20 %   1.000      0.0    1.0  Add           add
      20 %   1.000                  between steps
             5.000                  a run, median of 10
    """

    rows: tuple[Row, ...]
    seconds: float
    runs: int

    def table(self, top: int | None = None) -> str:
        """As text, in the order of running; with `top`, those that took longest first, and no more than that many."""
        rows = self.rows if top is None else sorted(self.rows, key=lambda row: -row.seconds)[:top]
        ops, hows = (max([len(word), *(len(getattr(row, word)) for row in rows)]) for word in ("op", "how"))
        lines = [f"{'share':>6}  {'ms':>6}  {'GFLOP/s':>7}  {'GB/s':>5}  {'op':{ops}}  {'how':{hows}}  node"]
        lines += [
            f"{self._share(row.seconds)}  {row.gflops:7.1f}  {row.gbytes:5.1f}  {row.op:{ops}}  {row.how:{hows}}  {row.node}"
            for row in rows
        ]
        if len(rows) < len(self.rows):
            rest = sum(row.seconds for row in self.rows) - sum(row.seconds for row in rows)
            lines.append(f"{self._share(rest)}{'':18}{len(self.rows) - len(rows)} more")
        between = self.seconds - sum(row.seconds for row in self.rows)
        lines.append(f"{self._share(max(between, 0.0))}{'':18}between steps")
        lines.append(f"{'':8}{1e3 * self.seconds:6.3f}{'':18}a run, median of {self.runs}")
        return "\n".join(line.rstrip() for line in lines)

    def _share(self, seconds: float) -> str:
        return f"{100 * seconds / (self.seconds or 1.0):4.0f} %  {1e3 * seconds:6.3f}"

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return dataclasses.asdict(self)
