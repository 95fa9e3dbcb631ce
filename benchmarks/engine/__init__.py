# SPDX-License-Identifier: Apache-2.0
"""The sparse engine beside other CPU runtimes: whole networks, all runtimes interleaved in one run.

`python -m benchmarks.engine.latency` adds lines to `results/latency.jsonl`; `python -m benchmarks.engine.tables` writes the
tables of docs/engine.md from them.
"""
