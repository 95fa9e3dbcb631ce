# SPDX-License-Identifier: Apache-2.0
"""One setting by itself: `python -m benchmarks.comb.one NETWORK KEEP WAY`, to look at before an experiment is run."""

from __future__ import annotations

import argparse
import dataclasses

import torch

from benchmarks.comb.runs import Setting, run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.comb.one", description=__doc__)
    parser.add_argument("network")
    parser.add_argument("keep", type=float)
    parser.add_argument("distill", nargs="?", default="kl")
    for field in dataclasses.fields(Setting)[2:]:
        if field.name != "distill":
            parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    torch.set_num_threads(1)
    run([Setting(**vars(parser.parse_args()))])


if __name__ == "__main__":
    main()
