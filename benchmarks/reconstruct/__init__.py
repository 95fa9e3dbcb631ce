# SPDX-License-Identifier: Apache-2.0
"""Layer solvers, measured: errors side by side, and the seconds and bytes that they take.

`python -m benchmarks.reconstruct.solvers pruning` say; it prints a table and leaves `results/pruning.jsonl`.
"""
