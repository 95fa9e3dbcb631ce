# SPDX-License-Identifier: Apache-2.0
"""A part of `make sanitize` that takes a minute: small graphs, hostile files, and many threads that run one engine."""

import os
import shutil

import pytest

from tests.engine.builds import SANITIZERS, build, call, damaged

pytestmark = [
    pytest.mark.skipif(
        shutil.which("c++") is None or shutil.which("cmake") is None, reason="no C++ compiler or no CMake"
    ),
    pytest.mark.skipif("FEATHERWEIGHT_SANITIZED" in os.environ, reason="make sanitize has more than this"),
]


@pytest.mark.parametrize("kind", SANITIZERS)
def test_small_graphs_in_cxx(kind: str) -> None:
    # Compiled without optimisation, which takes a quarter of the time.
    options = ["-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O0", "-DFEATHERWEIGHT_PYTHON=OFF"]
    checks = [f"-DFEATHERWEIGHT_SANITIZE={SANITIZERS[kind]}", "-DFEATHERWEIGHT_TESTS=ON", "-DFEATHERWEIGHT_SHARED=OFF"]
    targets = ("test_pool", "test_kernels", "test_files")
    folder = build(f"{kind}-quickly", *options, *checks, targets=targets)
    call(folder / "test_kernels", "1", TSAN_OPTIONS="halt_on_error=1")
    if kind == "thread":
        call(folder / "test_pool", TSAN_OPTIONS="halt_on_error=1")
    else:
        damaged(folder)
