# SPDX-License-Identifier: Apache-2.0
"""Structural change, carried out: one `apply` for every kind of edit, the same when live and when a plan is replayed.

`cut` carries out a choice of couplings with such edits, and `verify` proves it.
"""

from featherweight.edits.apply import apply, replay
from featherweight.edits.cut import Cut, cut, refusals
from featherweight.edits.exported import ExportedCut, cut_exported
from featherweight.edits.fake_quant import FakeQuantize, Saturated, saturation
from featherweight.edits.fold import fold_factors, foldable
from featherweight.edits.self_attention import SelfAttention
from featherweight.edits.swap import SWAPS, Attention
from featherweight.edits.verify import Verified, verify

__all__ = [
    "SWAPS",
    "Attention",
    "Cut",
    "ExportedCut",
    "FakeQuantize",
    "Saturated",
    "SelfAttention",
    "Verified",
    "apply",
    "cut",
    "cut_exported",
    "fold_factors",
    "foldable",
    "refusals",
    "replay",
    "saturation",
    "verify",
]
