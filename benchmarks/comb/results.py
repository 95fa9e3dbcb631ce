# SPDX-License-Identifier: Apache-2.0
"""The rows of each experiment, by its name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.results import Row

FOLDER = Path(__file__).parent / "results"


def there(experiment: str, folder: Path | None = None) -> list[Row]:
    """The rows that an experiment has left so far."""
    return results.read((folder or FOLDER) / f"{experiment}.jsonl")


def add(experiment: str, row: Row, folder: Path | None = None) -> None:
    """Adds a row, and shows it without what only a program reads."""
    row = row | {"threads": torch.get_num_threads(), "load_average": round(os.getloadavg()[0], 1)}
    results.add((folder or FOLDER) / f"{experiment}.jsonl", row)
    print(json.dumps({key: value for key, value in row.items() if not key.endswith("rows")}), flush=True)
