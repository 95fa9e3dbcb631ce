# SPDX-License-Identifier: Apache-2.0
"""Layers as matrices: which tensors of a model are weights, how each reads as rows x columns, and in which order they run."""

from featherweight.layers.kept import RULES, is_named, keep_by_name, keep_by_rule, names_of
from featherweight.layers.order import call_order
from featherweight.layers.select import matches, select
from featherweight.layers.tensors import fill, tensors_and_ties
from featherweight.layers.weights import Weight, from_matrix, to_matrix, weights
from featherweight.layers.zeros import Zeros, existing_zeros, unwrap

__all__ = [
    "RULES",
    "Weight",
    "Zeros",
    "call_order",
    "existing_zeros",
    "fill",
    "from_matrix",
    "is_named",
    "keep_by_name",
    "keep_by_rule",
    "matches",
    "names_of",
    "select",
    "tensors_and_ties",
    "to_matrix",
    "unwrap",
    "weights",
]
