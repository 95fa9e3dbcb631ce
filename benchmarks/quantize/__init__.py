# SPDX-License-Identifier: Apache-2.0
"""Fewer bits on real networks and real data: after training, while training, and in integers."""
