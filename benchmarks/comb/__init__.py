# SPDX-License-Identifier: Apache-2.0
"""Channels, heads and neurons cut out of networks on real data: images to classify, and land cover to segment.

One command each, `python -m benchmarks.comb.headline` say; it adds lines to `results/headline.jsonl`, from which
`python -m benchmarks.comb.tables` writes the tables and pictures of docs/comb.md.
"""
