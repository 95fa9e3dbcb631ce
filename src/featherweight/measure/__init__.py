# SPDX-License-Identifier: Apache-2.0
"""What a model weighs, does and takes: counters and an honest clock. It is handed callables and imports no runtime."""

from featherweight.measure.copies import eval_copy, run_once
from featherweight.measure.counts import Counts, LayerCounts, count
from featherweight.measure.latency import NOISE, Comparison, Latency, compare, time_callables
from featherweight.measure.machine import machine_facts
from featherweight.measure.scorecard import Scorecard, gains, spoken
from featherweight.measure.widths import width

__all__ = [
    "NOISE",
    "Comparison",
    "Counts",
    "Latency",
    "LayerCounts",
    "Scorecard",
    "compare",
    "count",
    "eval_copy",
    "gains",
    "machine_facts",
    "run_once",
    "spoken",
    "time_callables",
    "width",
]
