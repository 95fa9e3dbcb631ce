# SPDX-License-Identifier: Apache-2.0
"""Solvers after training: pure functions of a weight matrix W (rows, d) and its layer Hessian H (d, d)."""

from featherweight.solvers.contest import Judge
from featherweight.solvers.exact_obs import Elimination, eliminate, eliminate_again, eliminate_with_traces
from featherweight.solvers.gradients import refit_by_gradients
from featherweight.solvers.hessian import Damped, damp, layer_loss
from featherweight.solvers.joint import prune_and_quantize
from featherweight.solvers.pruning import PRUNERS, Pruned, prune
from featherweight.solvers.quantizing import QUANTIZERS, Quantized, quantize
from featherweight.solvers.refit import refit
from featherweight.solvers.units import Units, units_of

__all__ = [
    "PRUNERS",
    "QUANTIZERS",
    "Damped",
    "Elimination",
    "Judge",
    "Pruned",
    "Quantized",
    "Units",
    "damp",
    "eliminate",
    "eliminate_again",
    "eliminate_with_traces",
    "layer_loss",
    "prune",
    "prune_and_quantize",
    "quantize",
    "refit",
    "refit_by_gradients",
    "units_of",
]
