# SPDX-License-Identifier: Apache-2.0
"""Structural change, carried out: one `apply` for every kind of edit, the same when live and when a plan is replayed."""

from featherweight.edits.apply import apply, replay
from featherweight.edits.fake_quant import FakeQuantize
from featherweight.edits.swap import SWAPS, Attention

__all__ = ["SWAPS", "Attention", "FakeQuantize", "apply", "replay"]
