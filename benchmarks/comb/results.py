# SPDX-License-Identifier: Apache-2.0
"""Results as lines of JSON, one a run, written as it ends: an experiment that was stopped goes on where it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "results"
Row = dict[str, Any]


def there(experiment: str, folder: Path | None = None) -> list[Row]:
    """The rows that an experiment has left so far."""
    path = (folder or FOLDER) / f"{experiment}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add(experiment: str, row: Row, folder: Path | None = None) -> None:
    """Adds a row, and shows it without what only a program reads."""
    path = (folder or FOLDER) / f"{experiment}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    row = row | {"threads": torch.get_num_threads(), "load_average": round(os.getloadavg()[0], 1)}
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps({key: value for key, value in row.items() if not key.endswith("rows")}), flush=True)
