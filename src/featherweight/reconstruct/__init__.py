# SPDX-License-Identifier: Apache-2.0
"""Compression after training: the walk over a model's layers, and the database of every layer at every level."""

from featherweight.reconstruct.building import build_database
from featherweight.reconstruct.database import Database, Entry, load_database
from featherweight.reconstruct.entries import Contents
from featherweight.reconstruct.method import Reconstruct
from featherweight.reconstruct.profiles import Profile, global_loss, uniform, within, within_each
from featherweight.reconstruct.stitching import stitch

__all__ = [
    "Contents",
    "Database",
    "Entry",
    "Profile",
    "Reconstruct",
    "build_database",
    "global_loss",
    "load_database",
    "stitch",
    "uniform",
    "within",
    "within_each",
]
