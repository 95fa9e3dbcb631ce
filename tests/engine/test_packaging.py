# SPDX-License-Identifier: Apache-2.0
"""What the engine's distribution holds, and that what is built is what is here."""

import ast
import importlib
import importlib.metadata
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import featherweight_engine as core

ENGINE = Path(__file__).parents[2] / "engine"
PROJECT = tomllib.loads((ENGINE / "pyproject.toml").read_text())


def test_the_names_of_the_stub_are_those_of_the_core() -> None:
    stub = ast.parse((ENGINE / "python" / "featherweight_engine" / "_core.pyi").read_text())
    classes = {
        each.name: each for each in stub.body if isinstance(each, ast.ClassDef) and not each.name.startswith("_")
    }
    functions = {each.name for each in stub.body if isinstance(each, ast.FunctionDef)}
    compiled = importlib.import_module("featherweight_engine._core")
    assert set(classes) | functions == {name for name in dir(compiled) if not name.startswith("_")}
    assert set(core.__all__) == set(classes) | functions
    members = {each.name for each in classes["Engine"].body if isinstance(each, ast.FunctionDef)} - {"__init__"}
    assert members == {name for name in dir(compiled.Engine) if not name.startswith("_")}


def test_the_source_distribution_has_all_that_git_has(tmp_path: Path) -> None:
    program = f"from scikit_build_core.build import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", program], cwd=ENGINE, capture_output=True, text=True, check=True)
    [made] = tmp_path.glob("*.tar.gz")
    with tarfile.open(made) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    here = {
        path.relative_to(ENGINE).as_posix()
        for path in ENGINE.rglob("*")
        if path.is_file()
        and not any(part.startswith(("build", "__pycache__", ".")) for part in path.relative_to(ENGINE).parts)
    }
    assert {name for name in here if not name.endswith(".so")} <= inside
    assert {"CMakeLists.txt", "src/python.cpp", "include/featherweight/engine.h", "LICENSE"} <= inside
    assert not [name for name in inside if name.startswith("build") or name.endswith((".so", ".pyc"))]


def test_versions_and_licences_are_one() -> None:
    assert f"VERSION {PROJECT['project']['version']} " in (ENGINE / "CMakeLists.txt").read_text()
    root = ENGINE.parent
    assert (ENGINE / "LICENSE").read_text() == (root / "LICENSE").read_text()
    assert f"featherweight-engine=={PROJECT['project']['version']}" in (root / "constraints.txt").read_text()
