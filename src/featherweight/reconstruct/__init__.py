# SPDX-License-Identifier: Apache-2.0
"""Post-training solvers: pure functions of a weight matrix W (rows, d) and its layer Hessian H (d, d)."""

from featherweight.reconstruct.hessian import Damped, damp, layer_loss
from featherweight.reconstruct.refit import refit

__all__ = ["Damped", "damp", "layer_loss", "refit"]
