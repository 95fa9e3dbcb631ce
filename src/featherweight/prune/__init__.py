# SPDX-License-Identifier: Apache-2.0
"""Pruning: which weights become zero, while the network trains or at once."""

from featherweight.layers import Selected
from featherweight.prune.gradual import GradualPruning
from featherweight.prune.one_shot import Prune
from featherweight.prune.pruner import Pruner

__all__ = ["GradualPruning", "Prune", "Pruner", "Selected"]
