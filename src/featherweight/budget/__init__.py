# SPDX-License-Identifier: Apache-2.0
"""Budgets: what a user asks for, in units, and the loops that work until it holds."""

from featherweight.budget.iterative import Iterative, Until
from featherweight.budget.units import allowed_drop, limit_bytes

__all__ = ["Iterative", "Until", "allowed_drop", "limit_bytes"]
