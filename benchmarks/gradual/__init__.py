# SPDX-License-Identifier: Apache-2.0
"""Gradual magnitude pruning, measured: accuracy, dip and recovery, large-sparse against small-dense, overhead, packing.

One command each, `python -m benchmarks.gradual accuracy` say; it leaves `results/accuracy.json`, from which `plot` draws.
"""
