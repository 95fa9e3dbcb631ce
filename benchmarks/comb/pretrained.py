# SPDX-License-Identifier: Apache-2.0
"""Pretrained networks, cut at once and never trained: CREPE-full's channels, MiniLM's heads, neurons and channels.

The networks, samples and metrics are those that compression after training is measured on. Scores, refitting and
BatchNorm statistics come from unlabelled calibration samples; each share of MACs is tried with each way to choose.
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import torch

import featherweight as fw
from benchmarks.comb.pages import put, table
from benchmarks.comb.results import Row, add, there
from benchmarks.reconstruct.subjects import SUBJECTS, Subject, difference
from featherweight.measure import eval_copy
from featherweight.measure.macs import count_work

KEEPS = (0.9, 0.75, 0.5)
# Scores of unlike layers are not compared. What residuals run through is left whole: nothing is trained afterwards.
WHERE: dict[str, dict[str, Any]] = {
    "minilm": {"layers": ("*.query", "*.intermediate.dense"), "ranking": "isomorphic"},
    "crepe_full": {"ranking": "isomorphic"},
}
WAYS: dict[str, dict[str, Any]] = {
    "random": {"importance": "random"},
    "magnitude": {"importance": "magnitude"},
    "activation": {"importance": "activation"},
    "activation, refitted": {"importance": "activation", "refit": True},
    "structured OBS, refitted": {"importance": "structured_obs", "refit": True},
}
# A Hessian of CREPE-full's inputs (65,536 of one layer) fits into no memory: nothing can be refitted there.
CASES = {"minilm": tuple(WAYS), "crepe_full": ("random", "magnitude", "activation")}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.comb.pretrained", description=__doc__)
    parser.add_argument("subjects", nargs="*", default=[*CASES])
    torch.set_num_threads(1)
    done = {(row["subject"], row["way"], row["keep"]) for row in there("pretrained")}
    for name in parser.parse_args().subjects:
        missing = [(way, keep) for keep in KEEPS for way in CASES[name] if (name, way, keep) not in done]
        if missing:
            subject = SUBJECTS[name]()
            dense = subject.per_sample(subject.model)
            for way, keep in missing:
                add("pretrained", {"subject": name, "way": way, "keep": keep, **measured(subject, dense, way, keep)})
    write()


def measured(subject: Subject, dense: Any, way: str, keep: float) -> Row:
    model, events = copy.deepcopy(subject.model), []
    method = fw.PruneChannels({"macs": f"{100 * keep:g} %"}, **WHERE[subject.name], **WAYS[way])
    start = time.process_time()
    method(model, subject.task(), fw.Stage(report=events.append))
    seconds = round(time.process_time() - start, 1)
    found = subject.per_sample(model)
    macs = [sum(count_work(eval_copy(m), subject.example_inputs).macs.values()) for m in (model, subject.model)]
    parameters = [sum(p.numel() for p in m.parameters()) for m in (model, subject.model)]
    return {
        "metric": subject.metric,
        "dense": subject.summary(dense),
        "pruned": subject.summary(found),
        **difference(subject, dense, found),
        "macs_left": macs[0] / macs[1],
        "parameters_left": parameters[0] / parameters[1],
        "seconds": seconds,
        "texts": [event["text"] for event in events if event["kind"] in ("message", "unmet")],
    }


def write() -> None:
    order = [*WAYS]
    rows = sorted(there("pretrained"), key=lambda row: (row["subject"], -row["keep"], order.index(row["way"])))
    columns = {
        "network": lambda row: row["subject"],
        "MACs left": lambda row: f"{100 * row['macs_left']:.1f} %",
        "parameters left": lambda row: f"{100 * row['parameters_left']:.1f} %",
        "chosen by": lambda row: row["way"],
        "metric, dense": lambda row: f"{row['metric']} {row['dense']:.3f}",
        "pruned": lambda row: f"{row['pruned']:.3f}",
        "difference [95 %]": lambda row: f"{row['change']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]",
        "seconds": lambda row: f"{row['seconds']:.0f}",
    }
    put("pretrained", table(columns, rows))


if __name__ == "__main__":
    main()
