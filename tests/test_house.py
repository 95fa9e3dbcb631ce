# SPDX-License-Identifier: Apache-2.0
"""What the project promises of itself: quick to import, no pickle, no network, extras only where used, a whole wheel."""

import ast
import importlib
import importlib.metadata
import inspect
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import featherweight

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "featherweight"
FILES = sorted(SOURCE.rglob("*.py"))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = {
    "accelerate",
    "featherweight_engine",
    "jinja2",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "scipy",
    "sklearn",
}
NETWORK = {"aiohttp", "ftplib", "http", "httpx", "requests", "smtplib", "socket", "ssl", "urllib", "urllib3"}
PICKLES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
ROOMS = sorted(module.name for module in pkgutil.walk_packages(featherweight.__path__, "featherweight."))

by_file = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))


def run(program: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def imports(tree: ast.AST) -> set[str]:
    """The top-level packages that a file imports by statement, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def dotted(node: ast.expr) -> str:
    """`torch.load` for the expression that says so, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def test_importing_costs_next_to_nothing_beyond_torch() -> None:
    program = (
        "import time, torch; start = time.perf_counter(); import featherweight; print(time.perf_counter() - start)"
    )
    assert any(float(run(program)) < 0.3 for _ in range(4))  # the best of several: the machine may be busy


def test_importing_every_room_imports_no_extra() -> None:
    """`sys.modules` also shows what a room imports by way of others, which no reading of the source would."""
    program = (
        f"import importlib, sys, torch; before = set(sys.modules)\nfor room in {ROOMS}: importlib.import_module(room)\n"
    )
    loaded = run(program + "print(*{name.partition('.')[0] for name in set(sys.modules) - before})").split()
    assert "featherweight" in loaded
    assert not EXTRAS & set(loaded)


@by_file
def test_source_says_its_licence_and_its_idea(file: Path) -> None:
    text = file.read_text()
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert ast.get_docstring(ast.parse(text))


@by_file
def test_source_neither_unpickles_nor_evaluates_nor_talks_to_a_network(file: Path) -> None:
    tree = ast.parse(file.read_text())
    assert not imports(tree) & (NETWORK | PICKLES)
    calls = {dotted(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not calls & {"torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "eval", "exec", "__import__"}
    assert not any(call.endswith(("load_state_dict_from_url", "download_url_to_file")) for call in calls)


@by_file
def test_extras_are_imported_by_require_alone(file: Path) -> None:
    assert not imports(ast.parse(file.read_text())) & EXTRAS


def test_each_extra_that_an_error_names_can_be_installed() -> None:
    named = {}
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and dotted(node.func) == "require":
                values = [*node.args[1:], *(keyword.value for keyword in node.keywords if keyword.arg == "extra")]
                named |= {value.value: file.name for value in values if isinstance(value, ast.Constant)}
    assert set(named) <= set(PROJECT["project"]["optional-dependencies"]), named


def test_the_version_is_said_once() -> None:
    assert PROJECT["project"]["version"] == featherweight.__version__
    assert f"## [{featherweight.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {featherweight.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_constraints_pin_every_dependency_and_torch_plainly() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    project = PROJECT["project"]
    asked = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.split(r"[><=\[ ]", requirement)[0] for group in asked for requirement in group} - {"featherweight"}
    assert names <= set(pins)
    assert "+" not in pins["torch"]


def public() -> list[tuple[str, str, Any]]:
    """(room, name, object) of the package and of each room: what their `__all__` lists."""
    found = []
    for room in ["featherweight", *(room for room in ROOMS if room.count(".") == 1)]:
        module = importlib.import_module(room)
        found += [(room, name, getattr(module, name)) for name in getattr(module, "__all__", ())]
    return found


def test_every_public_name_is_explained() -> None:
    silent = [
        f"{room}.{name}"
        for room, name, value in public()
        if (inspect.isclass(value) or inspect.isfunction(value)) and not (value.__doc__ or "").strip()
    ]
    assert silent == []


# Names of the package itself that need no example, with the reason.
NO_EXAMPLE = {
    "Recipe": "what load_recipe gives, and shown there",
    "Result": "what compress returns, and shown there",
    "load": "the other half of save, and shown there",
}


def test_every_name_of_the_package_shows_how_it_is_used() -> None:
    bare = [
        name
        for room, name, value in public()
        if room == "featherweight" and (inspect.isclass(value) or inspect.isfunction(value))
        if not (inspect.isclass(value) and issubclass(value, Exception))
        if name not in NO_EXAMPLE and ">>> " not in (value.__doc__ or "")
    ]
    assert bare == []


def test_the_wheel_is_pure_python_and_whole(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "src", checkout / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        ".",
    ]
    built = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    [wheel] = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    files = [file for file in SOURCE.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert SOURCE / "py.typed" in files
    assert {f"featherweight/{file.relative_to(SOURCE).as_posix()}" for file in files} - inside == set()
    assert any(name.endswith("licenses/LICENSE") for name in inside)
