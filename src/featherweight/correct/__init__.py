# SPDX-License-Identifier: Apache-2.0
"""Corrections after any compression, from unlabelled samples: what it shifted is put right where that costs nothing."""

from featherweight.correct.batch_norm import reestimate_batch_norm
from featherweight.correct.bias import correct_bias
from featherweight.correct.fit import fit_outputs
from featherweight.correct.keep import Correction, Moved, keep_if_better
from featherweight.correct.norms import match_moments
from featherweight.correct.outputs import output_error
from featherweight.correct.steps import CORRECTIONS, correct

__all__ = [
    "CORRECTIONS",
    "Correction",
    "Moved",
    "correct",
    "correct_bias",
    "fit_outputs",
    "keep_if_better",
    "match_moments",
    "output_error",
    "reestimate_batch_norm",
]
