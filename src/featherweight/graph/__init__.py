# SPDX-License-Identifier: Apache-2.0
"""Comb: which channels and heads of a model belong together, found by labels that ride through its graph. Changes nothing."""

from featherweight.graph.couplings import Coupling, Frozen, Group, Member, Op, Role, Size, Trace
from featherweight.graph.trace import trace

__all__ = ["Coupling", "Frozen", "Group", "Member", "Op", "Role", "Size", "Trace", "trace"]
