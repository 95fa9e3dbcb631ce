# SPDX-License-Identifier: Apache-2.0
"""Fewer bits: which values weights and activations may take, after training or while a network trains."""

from featherweight.quantize.centroids import TuneCentroids
from featherweight.quantize.cluster import Cluster
from featherweight.quantize.method import Quantize
from featherweight.quantize.mixed import MixedQuantize
from featherweight.quantize.qat import QAT
from featherweight.quantize.sensitivity import Sensitivity, mixed_bits, sensitivity

__all__ = [
    "QAT",
    "Cluster",
    "MixedQuantize",
    "Quantize",
    "Sensitivity",
    "TuneCentroids",
    "mixed_bits",
    "sensitivity",
]
