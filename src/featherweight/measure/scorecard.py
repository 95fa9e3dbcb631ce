# SPDX-License-Identifier: Apache-2.0
"""What was measured of one model (`Scorecard`), and two of them set side by side in words (`gains`).

The words are a pure function of the numbers: what is not there is not spoken of, what is within noise is not claimed,
and what a user may expect and does not get ("90 % zeros") is said as loudly as what they get.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from featherweight.measure.latency import Comparison, Latency

__all__ = ["Scorecard", "gains", "spoken"]

# As their makers write them, and all of them multiply by zeros.
_STOCK_RUNTIMES = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


@dataclasses.dataclass(frozen=True)
class Scorecard:
    """What was measured of one model; it knows nothing of how the model came about. None: not measured.

    Counts are those of `count`; `bits` is how many each number of a weight takes, on average, and `input_bits` how many
    the grids on inputs of layers have, None where there are none. `packed_bytes` is the packed file's size,
    `gzip_bytes` the size of the dense weights through gzip, for comparison. `latency` is by runtime; `metric` the
    user's own figure on `samples` examples.

    >>> card = Scorecard(10, 5, 100, 1600, 40)
    >>> Scorecard.from_dict(card.to_dict()) == card
    True
    """

    parameters: int
    nonzeros: int
    macs: int
    bops: int
    dense_bytes: int
    packed_bytes: int | None = None
    gzip_bytes: int | None = None
    peak_memory_bytes: int | None = None
    latency: Mapping[str, Latency] = dataclasses.field(default_factory=dict)
    metric: float | None = None
    metric_name: str = "metric"
    samples: int | None = None
    bits: float | None = None
    input_bits: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; the metric to six significant digits, latencies as `Latency.to_dict` has them."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        metric = None if self.metric is None else float(f"{self.metric:.6g}")
        return {
            **data,
            "metric": metric,
            "latency": {name: latency.to_dict() for name, latency in self.latency.items()},
        }

    @property
    def simulated(self) -> bool:
        """Whether PyTorch only simulates what a runtime computes in integers, which costs it time and saves none."""
        return self.input_bits is not None

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Scorecard:
        """Reads what `to_dict` wrote."""
        latency = {name: Latency.from_dict(entry) for name, entry in data["latency"].items()}
        return Scorecard(**{**data, "latency": latency})


def gains(before: Scorecard, after: Scorecard, comparisons: Mapping[str, Comparison]) -> list[str]:
    """What was and was not gained, the sum of it first: one sentence a line, without a full stop.

    `comparisons` are by runtime, `before` as the baseline.

    >>> before, after = Scorecard(100, 100, 7, 7, 400, 400), Scorecard(100, 10, 7, 1, 400, 50)
    >>> same = Comparison(1.0, 0.98, 1.03, None, "no faster: 1.00x, within noise (95 % interval 0.98 to 1.03)")
    >>> gains(before, after, {"onnxruntime": same})[0]
    '90 % zeros: 8.0x smaller on disk, no faster in ONNX Runtime, which does not skip zeros'
    """
    sparser = _sparsity(after) > _sparsity(before)
    told = [_disk(before, after), *_speeds(comparisons, sparser and after.macs >= before.macs, after.simulated)]
    headline = f"{_cause(before, after)}: {', '.join(filter(None, told)) or 'nothing else was measured'}"
    details = [f"{spoken(name, after.simulated)}: {comparison.words}" for name, comparison in comparisons.items()]
    return [headline, *details, *_work(before, after, sparser), *_gzip(after), *_metric(before, after)]


def _sparsity(card: Scorecard) -> float:
    return 1 - card.nonzeros / card.parameters if card.parameters else 0.0


def _cause(before: Scorecard, after: Scorecard) -> str:
    causes = []
    if after.parameters != before.parameters:
        causes.append(_times(before.parameters, after.parameters, "fewer", "more") + " parameters")
    if _sparsity(after) > _sparsity(before):
        causes.append(f"{_percent(_sparsity(after))} zeros")
    if after.bits is not None and after.bits < 0.99 * (before.bits or 32):
        inputs = f" and {after.input_bits}-bit inputs" if after.input_bits is not None else ""
        causes.append(f"{after.bits:.2g}-bit weights{inputs}")
    return " and ".join(causes) or "The same parameters"


def _disk(before: Scorecard, after: Scorecard) -> str:
    """Against the dense weights, which is what the user had."""
    if after.packed_bytes is None:
        return ""
    if after.packed_bytes >= 0.99 * before.dense_bytes:
        return "no smaller on disk"
    return f"{before.dense_bytes / after.packed_bytes:.1f}x smaller on disk"


def spoken(runtime: str, simulated: bool = False) -> str:
    """A runtime as people call it, and what is no fair clock of it: integers that it only simulates.

    >>> spoken("onnxruntime"), spoken("torch", simulated=True)
    ('ONNX Runtime', 'PyTorch (which only simulates integers)')
    """
    name = {**_STOCK_RUNTIMES, "engine": "the engine"}.get(runtime, runtime)
    return f"{name} (which only simulates integers)" if simulated and runtime == "torch" else name


def _speeds(comparisons: Mapping[str, Comparison], zeros_alone: bool, simulated: bool) -> list[str]:
    """Runtimes of one verdict are told together."""
    told = [f"{c.ratio:.1f}x faster in {spoken(n, simulated)}" for n, c in comparisons.items() if c.faster]
    told += [
        f"{1 / c.ratio:.1f}x slower in {spoken(n, simulated)}" for n, c in comparisons.items() if c.faster is False
    ]
    same = [name for name, comparison in comparisons.items() if comparison.faster is None]
    if same:
        names = _and([spoken(name, simulated) for name in same])
        blind = zeros_alone and all(name in _STOCK_RUNTIMES for name in same)
        reason = f", which {'does' if len(same) == 1 else 'do'} not skip zeros" if blind else ""
        told.append(f"no faster in {names}{reason}")
    return told


def _work(before: Scorecard, after: Scorecard, sparser: bool) -> list[str]:
    lines = []
    if after.macs != before.macs:
        lines.append(f"MACs: {_times(before.macs, after.macs, 'fewer', 'more')} ({before.macs:,} to {after.macs:,})")
    elif sparser:
        lines.append(f"MACs: {after.macs:,} as before, since a zero is multiplied like any number")
    if after.bops < before.bops:
        proxy = "a proxy that no stock runtime turns into time"
        if after.simulated:
            proxy = "a proxy: runtimes turn integers into time, and zeros not"
        lines.append(f"BOPs: {_times(before.bops, after.bops, 'fewer', 'more')}, {proxy}")
    if before.peak_memory_bytes and after.peak_memory_bytes:
        kept = after.peak_memory_bytes / before.peak_memory_bytes
        change = "the same" if abs(kept - 1) < 0.01 else _times(1.0, kept, "less", "more")
        lines.append(f"Peak memory of a forward: {change} ({_size(after.peak_memory_bytes)})")
    return lines


def _gzip(after: Scorecard) -> list[str]:
    if after.gzip_bytes is None or after.packed_bytes is None:
        return []
    return [
        f"On disk: {_size(after.packed_bytes)} packed, {_size(after.gzip_bytes)} by gzip, {_size(after.dense_bytes)} dense"
    ]


def _metric(before: Scorecard, after: Scorecard) -> list[str]:
    """The two figures and n; whether they differ is for a paired test on the examples, which two figures are not."""
    if before.metric is None or after.metric is None:
        return []
    n = f" (n = {after.samples:,})" if after.samples else ""
    return [f"{after.metric_name}: {before.metric:.4g} before, {after.metric:.4g} after{n}"]


def _times(before: float, after: float, fewer: str, more: str) -> str:
    if not after:
        return "none left"
    return f"{before / after:.1f}x {fewer}" if after <= before else f"{after / before:.1f}x {more}"


def _percent(share: float) -> str:
    """Never rounded up to all or down to none."""
    text = f"{100 * share:.0f}"
    return f"{100 * share:.2f} %" if text in ("0", "100") and share not in (0.0, 1.0) else f"{text} %"


def _size(count: int) -> str:
    for unit, step in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= step:
            return f"{count / step:.3g} {unit}"
    return f"{count} bytes"


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
