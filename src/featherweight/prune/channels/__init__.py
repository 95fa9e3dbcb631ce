# SPDX-License-Identifier: Apache-2.0
"""Cutting channels, neurons, heads and blocks out of a model: which go, while it trains or at once."""

from featherweight.prune.channels.depth import DropBlocks
from featherweight.prune.channels.gradual import GradualChannelPruning
from featherweight.prune.channels.heads import HeadTables, head_tables
from featherweight.prune.channels.importance import IMPORTANCES
from featherweight.prune.channels.method import PruneChannels
from featherweight.prune.channels.pruner import ChannelPruner

__all__ = [
    "IMPORTANCES",
    "ChannelPruner",
    "DropBlocks",
    "GradualChannelPruning",
    "HeadTables",
    "PruneChannels",
    "head_tables",
]
