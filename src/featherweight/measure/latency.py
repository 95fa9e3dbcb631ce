# SPDX-License-Identifier: Apache-2.0
"""Latency of any callables by one protocol, and comparisons that claim no more than was measured.

All candidates are called in every round, in an order shuffled anew, so that a machine that grows slower or faster
while it is measured does so for all. Fixed threads, first call and warm-up kept apart, no garbage collection while
timing, every sample kept. A comparison gives an interval and says "faster" only where all of it lies outside the noise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from featherweight.errors import FeatherweightError, OptionError

__all__ = ["NOISE", "Comparison", "Latency", "compare", "time_callables"]

# Two sessions opened on one and the same file have differed by 2 % though nothing but addresses did (160 pairs of ONNX
# Runtime and OpenVINO), so no smaller difference is claimed, however many rounds make its interval narrow.
NOISE = 0.03


@dataclasses.dataclass(frozen=True)
class Latency:
    """Timed calls of one candidate, in milliseconds of wall time a call.

    `first_ms` is the very first call, before any warm-up. `throughput_per_s` is items (calls x batch) a second over all
    timed calls. `samples_ms` are in round order: sample i of every candidate of one measurement is of the same round.
    `measured` tells measurements apart: candidates that were timed side by side share it.
    """

    name: str
    median_ms: float
    p90_ms: float
    iqr_ms: float
    n: int
    threads: int
    batch: int
    first_ms: float
    throughput_per_s: float
    samples_ms: tuple[float, ...]
    measured: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, to four significant digits; samples to 0.1 microseconds."""
        data = {key: _four_digits(v) if isinstance(v, float) else v for key, v in dataclasses.asdict(self).items()}
        return {**data, "samples_ms": [round(ms, 4) for ms in self.samples_ms]}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Latency:
        """Reads what `to_dict` wrote."""
        return Latency(**{**data, "samples_ms": tuple(data["samples_ms"])})


def time_callables(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    threads: int | None = None,
    warmup: int = 10,
    runs: int = 100,
    min_seconds: float = 0.0,
    batch: int = 1,
    seed: int = 0,
) -> dict[str, Latency]:
    """Times callables without arguments against each other, interleaved call by call.

    `runs` rounds of one call each, and more until the rounds have taken `min_seconds`. `threads` sets torch's for the
    time of the measurement (None leaves them); sessions of other runtimes bring their own, and one that says otherwise
    (its attribute `threads`) is refused. `batch` is the items that one call handles. A callable that only starts work
    on a device must wait for it.

    Raises `OptionError` for fewer than 50 runs, and `FeatherweightError` that names the candidate whose call failed.

    >>> times = time_callables({"short": lambda: sum(range(100)), "long": lambda: sum(range(9000))}, runs=50)
    >>> compare(times["long"], times["short"]).faster
    True
    """
    _check(candidates, threads, warmup, runs, batch)
    measured = datetime.now(UTC).isoformat(timespec="microseconds")
    with _torch_threads(threads) as used:
        first = {name: _call(name, candidate) for name, candidate in candidates.items()}
        for _ in range(warmup):
            for name, candidate in candidates.items():
                _call(name, candidate)
        samples = _rounds(candidates, runs, min_seconds, random.Random(seed))
    return {
        name: _latency(name, samples[name], first[name], threads=used, batch=batch, measured=measured)
        for name in candidates
    }


def _rounds(
    candidates: Mapping[str, Callable[[], Any]], runs: int, min_seconds: float, chance: random.Random
) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    with _no_garbage_collection():
        start = time.perf_counter()
        while len(samples[order[0]]) < runs or time.perf_counter() - start < min_seconds:
            chance.shuffle(order)
            for name in order:
                samples[name].append(_call(name, candidates[name]))
    return samples


def _call(name: str, candidate: Callable[[], Any]) -> float:
    try:
        start = time.perf_counter_ns()
        candidate()
        return (time.perf_counter_ns() - start) / 1e6
    except Exception as error:
        raise FeatherweightError(
            f"{name} failed while it was timed: {type(error).__name__}: {error}. Nothing was measured; call it once by "
            "itself to see the whole trace, or leave it out."
        ) from error


def _latency(name: str, samples: list[float], first: float, **facts: Any) -> Latency:
    low, median, high, p90 = np.percentile(samples, [25, 50, 75, 90])
    return Latency(
        name=name,
        median_ms=float(median),
        p90_ms=float(p90),
        iqr_ms=float(high - low),
        n=len(samples),
        first_ms=first,
        throughput_per_s=1e3 * facts["batch"] * len(samples) / sum(samples),
        samples_ms=tuple(samples),
        **facts,
    )


def _check(
    candidates: Mapping[str, Callable[[], Any]], threads: int | None, warmup: int, runs: int, batch: int
) -> None:
    if not candidates:
        raise OptionError("there is nothing to time: give {name: callable}.")
    if runs < 50:
        raise OptionError(
            f"runs={runs}: fewer than 50 timed calls say too little about a median; give runs=50 or more."
        )
    if warmup < 1 or batch < 1 or (threads is not None and threads < 1):
        raise OptionError(f"warmup={warmup}, batch={batch}, threads={threads}: each must be 1 or more.")
    for name, candidate in candidates.items():
        own = getattr(getattr(candidate, "func", candidate), "threads", None)  # functools.partial(session, x)
        if threads is not None and own is not None and own != threads:
            raise OptionError(f"{name} runs on {own} threads and would be timed as {threads}; open it with {threads}.")


@contextlib.contextmanager
def _torch_threads(threads: int | None) -> Iterator[int]:
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How many times faster the candidate is than the baseline: `ratio` of medians with a 95 % interval.

    `faster` is True or False only where all of the interval lies beyond the noise, and None within it. `words` says it.
    """

    ratio: float
    low: float
    high: float
    faster: bool | None
    words: str

    def to_dict(self) -> dict[str, Any]:
        return {k: _four_digits(v) if isinstance(v, float) else v for k, v in dataclasses.asdict(self).items()}


def compare(baseline: Latency, candidate: Latency, *, noise: float = NOISE, resamples: int = 1000) -> Comparison:
    """Compares two latencies of one measurement: baseline median / candidate median, with what it is worth.

    The interval is a bootstrap over runs of consecutive rounds (moving blocks of sqrt(n)), the same for both, since
    neighbouring rounds are slow or fast together. To be claimed, a difference must exceed `noise` and a quarter of the
    wider interquartile range, and show in each quarter of the rounds: on a busy machine a few bad seconds may hit one
    candidate alone. Of 320 pairs of equal sessions on an overloaded machine this called none different. What was not
    measured side by side, on as many threads and with as large a batch is shown, but nothing is claimed.

    >>> same = Latency("a", 1.0, 1.0, 0.0, 50, 1, 1, 2.0, 1000.0, (1.0,) * 50)
    >>> compare(same, dataclasses.replace(same, name="b")).words
    'no faster: 1.00x, within noise (95 % interval 1.00 to 1.00)'
    """
    ratio = baseline.median_ms / candidate.median_ms
    low, high = _interval(np.asarray(baseline.samples_ms), np.asarray(candidate.samples_ms), resamples)
    apart = _apart(baseline, candidate)
    interval = f"95 % interval {low:.2f} to {high:.2f}"
    if apart:
        return Comparison(ratio, low, high, None, f"no claim: {apart} ({ratio:.2f}x, {interval})")
    slowest, fastest = _range_of_quarters(baseline, candidate)
    noise = max(noise, *(latency.iqr_ms / latency.median_ms / 4 for latency in (baseline, candidate)))
    if min(low, slowest) > 1 + noise:
        return Comparison(ratio, low, high, True, f"{ratio:.2f}x faster ({interval})")
    if max(high, fastest) < 1 / (1 + noise):
        inverse = f"95 % interval {1 / high:.2f} to {1 / low:.2f}"
        return Comparison(ratio, low, high, False, f"{1 / ratio:.2f}x slower ({inverse})")
    return Comparison(ratio, low, high, None, f"no faster: {ratio:.2f}x, within noise ({interval})")


def _apart(baseline: Latency, candidate: Latency) -> str:
    if baseline.measured != candidate.measured:
        return "not measured side by side"
    if baseline.threads != candidate.threads:
        return f"{baseline.threads} threads against {candidate.threads}"
    return "" if baseline.batch == candidate.batch else f"batch {baseline.batch} against {candidate.batch}"


def _range_of_quarters(baseline: Latency, candidate: Latency) -> tuple[float, float]:
    quarters = zip(np.array_split(baseline.samples_ms, 4), np.array_split(candidate.samples_ms, 4), strict=True)
    ratios = [float(np.median(before) / np.median(after)) for before, after in quarters]
    return min(ratios), max(ratios)


def _interval(baseline: np.ndarray, candidate: np.ndarray, resamples: int) -> tuple[float, float]:
    chance = np.random.default_rng(0)
    paired = len(baseline) == len(candidate)
    together = max(1, 2**22 // max(len(baseline), len(candidate)))  # resamples at once, so that memory stays bounded
    ratios = []
    for count in [together] * (resamples // together) + [resamples % together]:
        rounds = _blocks(len(baseline), count, chance)
        others = rounds if paired else _blocks(len(candidate), count, chance)
        ratios.append(np.median(baseline[rounds], axis=1) / np.median(candidate[others], axis=1))
    low, high = np.percentile(np.concatenate(ratios), [2.5, 97.5])
    return float(low), float(high)


def _blocks(n: int, count: int, chance: np.random.Generator) -> np.ndarray:
    """`count` x n indices made of runs of about sqrt(n) consecutive ones (circular: each index is as likely)."""
    length = math.isqrt(n)
    starts = chance.integers(n, size=(count, -(-n // length), 1))
    return ((starts + np.arange(length)) % n).reshape(count, -1)[:, :n]


def _four_digits(value: float) -> float:
    return float(f"{value:.4g}")
