# SPDX-License-Identifier: Apache-2.0
"""Layers as matrices: which tensors are weights, how each reads as rows x columns, the problems they pose on data."""

from featherweight.layers.calibration import Calibration, draw, numbered
from featherweight.layers.held import Held, hold
from featherweight.layers.kept import (
    RULES,
    Selected,
    check_globs,
    is_named,
    keep_by_name,
    keep_by_rule,
    last_match,
    names_of,
    refuse_nothing,
    selected,
)
from featherweight.layers.on_grids import existing_grids
from featherweight.layers.order import call_order
from featherweight.layers.problems import Problem, problems, split
from featherweight.layers.readers import Readers, read_by
from featherweight.layers.select import matches, select
from featherweight.layers.statistics import Statistics, bytes_of, call_steps, collect, passes
from featherweight.layers.tensors import fill, tensors_and_ties
from featherweight.layers.weights import Weight, from_matrix, to_matrix, weights
from featherweight.layers.zeros import Zeros, existing_zeros, unwrap

__all__ = [
    "RULES",
    "Calibration",
    "Held",
    "Problem",
    "Readers",
    "Selected",
    "Statistics",
    "Weight",
    "Zeros",
    "bytes_of",
    "call_order",
    "call_steps",
    "check_globs",
    "collect",
    "draw",
    "existing_grids",
    "existing_zeros",
    "fill",
    "from_matrix",
    "hold",
    "is_named",
    "keep_by_name",
    "keep_by_rule",
    "last_match",
    "matches",
    "names_of",
    "numbered",
    "passes",
    "problems",
    "read_by",
    "refuse_nothing",
    "select",
    "selected",
    "split",
    "tensors_and_ties",
    "to_matrix",
    "unwrap",
    "weights",
]
