# SPDX-License-Identifier: Apache-2.0
"""Low rank: a layer as the product of two smaller ones."""

from featherweight.factorize.svd import Factorize

__all__ = ["Factorize"]
