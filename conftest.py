# SPDX-License-Identifier: Apache-2.0
"""For tests and doctests alike: the same random numbers in each, on one thread, and no file left in the checkout."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported, and for the processes that tests start: sums on two threads end in other last bits.
os.environ["OMP_NUM_THREADS"] = "1"
# Tables are as wide as they need, whatever the terminal that the tests are started from, or their own workers, say.
os.environ.pop("COLUMNS", None)

import pytest
import torch
from hypothesis import settings

# A busy machine is no failure, and a red test is red again the next time.
settings.register_profile("house", deadline=None, derandomize=True)
settings.load_profile("house")


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Whatever ran before, in whatever order: seed, threads and default dtype are as in a test run alone."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture(autouse=True)
def doctests_write_elsewhere(request: pytest.FixtureRequest) -> None:
    """An example that saves to `run` does so in a folder of its own."""
    if isinstance(request.node, pytest.DoctestItem):
        folder: Path = request.getfixturevalue("tmp_path")
        request.getfixturevalue("monkeypatch").chdir(folder)
