# SPDX-License-Identifier: Apache-2.0
"""Post-training solvers: pure functions of a weight matrix W (rows, d) and its layer Hessian H (d, d)."""

from featherweight.reconstruct.hessian import Damped, damp, layer_loss
from featherweight.reconstruct.pruning import PRUNERS, Pruned, prune
from featherweight.reconstruct.refit import refit

__all__ = ["PRUNERS", "Damped", "Pruned", "damp", "layer_loss", "prune", "refit"]
