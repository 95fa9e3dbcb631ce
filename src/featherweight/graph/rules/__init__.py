# SPDX-License-Identifier: Apache-2.0
"""One small rule an op: how labels go through it. An op that is in no table freezes what it touches."""

from __future__ import annotations

from featherweight.graph.rules import compute, move, norms, products, recurrent
from featherweight.graph.walk import Rule

__all__ = ["RULES"]

RULES: dict[str, Rule] = compute.RULES | move.RULES | norms.RULES | products.RULES | recurrent.RULES
