# SPDX-License-Identifier: Apache-2.0
"""Images and their classes in three parts, as the benchmarks that train networks have them."""

from typing import NamedTuple

from torch import Tensor

__all__ = ["Data", "Split"]


class Split(NamedTuple):
    """Images [n, 1, 28, 28], as the data set at hand has them, and their classes [n]."""

    images: Tensor
    labels: Tensor


class Data(NamedTuple):
    train: Split
    validation: Split
    test: Split
