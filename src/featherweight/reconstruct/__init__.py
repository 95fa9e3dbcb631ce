# SPDX-License-Identifier: Apache-2.0
"""Post-training solvers: pure functions of a weight matrix W (rows, d) and its layer Hessian H (d, d)."""

from featherweight.reconstruct.exact_obs import Elimination, eliminate, eliminate_again, eliminate_with_traces
from featherweight.reconstruct.hessian import Damped, damp, layer_loss
from featherweight.reconstruct.joint import prune_and_quantize
from featherweight.reconstruct.pruning import PRUNERS, Pruned, prune
from featherweight.reconstruct.quantizing import QUANTIZERS, Quantized, quantize
from featherweight.reconstruct.refit import refit
from featherweight.reconstruct.units import Units, units_of

__all__ = [
    "PRUNERS",
    "QUANTIZERS",
    "Damped",
    "Elimination",
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
    "units_of",
]
