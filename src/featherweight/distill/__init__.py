# SPDX-License-Identifier: Apache-2.0
"""Distillation: a smaller network imitates what a larger one, such as itself before pruning, answers and sees.

Losses are pure functions, options are frozen, and one object at work serves `Train(distill=...)` and your own loop.
"""

from featherweight.distill.cirkd import CIRKD
from featherweight.distill.distilling import Distill, Distilling
from featherweight.distill.options import CWD, KL, Attention, Features, Loss

__all__ = ["CIRKD", "CWD", "KL", "Attention", "Distill", "Distilling", "Features", "Loss"]
