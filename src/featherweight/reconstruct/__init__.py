# SPDX-License-Identifier: Apache-2.0
"""Compression after training: solvers as pure functions of a weight W (rows, d) and its layer Hessian H (d, d), the walk
over a model's layers, and the database of every layer at every level."""

from featherweight.reconstruct.building import build_database
from featherweight.reconstruct.contest import Judge
from featherweight.reconstruct.database import Database, Entry, load_database
from featherweight.reconstruct.entries import Contents
from featherweight.reconstruct.exact_obs import Elimination, eliminate, eliminate_again, eliminate_with_traces
from featherweight.reconstruct.gradients import refit_by_gradients
from featherweight.reconstruct.hessian import Damped, damp, layer_loss
from featherweight.reconstruct.joint import prune_and_quantize
from featherweight.reconstruct.method import Reconstruct
from featherweight.reconstruct.profiles import Profile, global_loss, uniform, within, within_each
from featherweight.reconstruct.pruning import PRUNERS, Pruned, prune
from featherweight.reconstruct.quantizing import QUANTIZERS, Quantized, quantize
from featherweight.reconstruct.refit import refit
from featherweight.reconstruct.stitching import stitch
from featherweight.reconstruct.units import Units, units_of

__all__ = [
    "PRUNERS",
    "QUANTIZERS",
    "Contents",
    "Damped",
    "Database",
    "Elimination",
    "Entry",
    "Judge",
    "Profile",
    "Pruned",
    "Quantized",
    "Reconstruct",
    "Units",
    "build_database",
    "damp",
    "eliminate",
    "eliminate_again",
    "eliminate_with_traces",
    "global_loss",
    "layer_loss",
    "load_database",
    "prune",
    "prune_and_quantize",
    "quantize",
    "refit",
    "refit_by_gradients",
    "stitch",
    "uniform",
    "units_of",
    "within",
    "within_each",
]
