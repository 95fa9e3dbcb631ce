# SPDX-License-Identifier: Apache-2.0
"""What cannot be cut in place is cut out of the exported program, where the numbers of the code are numbers of the graph."""

from __future__ import annotations

import pytest

from featherweight.edits import cut_exported
from featherweight.errors import FeatherweightError
from tests.graph.patterns import build
from tests.graph.test_cuts_of_patterns import IN_CODE, answers_as_if_absent, some
from tests.graph.test_trace_of_patterns import traced

NOT_THERE_EITHER = {
    "gather_roll": "indices in a buffer are values",
    "linear_attention dims": "the proof masks by zeros, and elu(0) + 1 is not 0",
    "lstm_projected": "torch's LSTM takes one projection's size for all",
}


@pytest.mark.parametrize("key", IN_CODE)
def test_half_of_everything_is_cut_out_of_the_program(key):
    name, _, grain = key.partition(" ")
    found = traced(name, grain or "heads")
    couplings = [coupling for group in found.groups for coupling in some(group, 0.5, seed=2)]
    model, inputs = build(name)
    try:
        done = cut_exported(model, couplings, inputs, trace=found)
    except FeatherweightError:
        assert key in NOT_THERE_EITHER
    else:
        answers_as_if_absent(name, found, couplings, done.program)
