# SPDX-License-Identifier: Apache-2.0
"""Comb: which channels and heads of a model belong together, by labels that ride through its graph. Changes nothing."""

from featherweight.graph.combing import trace
from featherweight.graph.couplings import Coupling, Frozen, Group, Member, Op, Role, Size, Trace
from featherweight.graph.program import Program, rewrite

__all__ = ["Coupling", "Frozen", "Group", "Member", "Op", "Program", "Role", "Size", "Trace", "rewrite", "trace"]
