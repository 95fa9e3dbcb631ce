# SPDX-License-Identifier: Apache-2.0
"""What this machine and this installation can do: extras, runtimes, instruction sets, and whether files can be written.

Nothing is changed and nothing leaves the machine. What a processor accelerates is said by kind of model, since an
instruction set gains nothing for a model that does not use it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from featherweight import __version__
from featherweight.deploy.sessions import openvino_core
from featherweight.errors import MissingExtra, OptionError, nearest, require

__all__ = ["diagnose", "need"]

# What an instruction set does for whom; the first that is there of each group is said.
_GAINS = (
    (("amx_int8", "avx512_vnni", "avx_vnni", "asimddp", "i8mm"), "int8 models, in ONNX Runtime and OpenVINO"),
    (("amx_bf16", "avx512_bf16", "bf16"), "bfloat16 training and inference"),
    (("avx512f", "avx2", "asimd", "sve"), "float32 of any kind"),
)
_ZEROS = "Zeros in weights make files smaller. Of the runtimes listed here only the engine skips them: the others are no faster."


def diagnose(folder: str | Path = ".") -> dict[str, Any]:
    """Versions, extras with the command that installs each, the machine, runtimes, and whether `folder` can be written.

    >>> facts = diagnose()
    >>> sorted(facts["extras"]["onnx"])
    ['installed', 'missing', 'packages', 'run']
    >>> facts["runtimes"]["torch"]["works"]
    True
    """
    from featherweight.measure import machine_facts

    machine = machine_facts()
    return {
        "featherweight": __version__,
        "machine": machine,
        "accelerates": _accelerates(machine["flags"]),
        "zeros": _ZEROS,
        "extras": extras(),
        "runtimes": _runtimes(),
        "writable": _writable(Path(folder)),
        "methods": _methods(),
    }


def extras() -> dict[str, dict[str, Any]]:
    """What each extra brings and whether it is there, as the installed package's own metadata has it."""
    found: dict[str, dict[str, Any]] = {}
    for line in importlib.metadata.requires("featherweight") or ():
        match = re.match(r"""([\w.-]+)(\[[^]]*\])?\s*([^;]*);.*extra == ['"](\w+)['"]""", line)
        if match is None or match[1] == "featherweight" or match[4] == "dev":
            continue
        name, wanted, extra = match[1], match[3].strip(), match[4]
        entry = found.setdefault(extra, {"installed": True, "packages": {}, "missing": [], "run": None})
        version = _version(name)
        entry["packages"][name] = version
        if version is None or not _new_enough(version, wanted):
            entry["missing"].append(f"{name}{wanted}")
            entry["installed"] = False
            entry["run"] = f'pip install "featherweight[{extra}]"'
    return dict(sorted(found.items()))


def need(wanted: Sequence[str]) -> None:
    """Raises `MissingExtra` with one command for all that is missing, `OptionError` for an unknown extra.

    >>> need([])
    """
    known = extras()
    for name in wanted:
        if name not in known:
            close = ", ".join(nearest(name, known)) or ", ".join(known)
            raise OptionError(f"There is no extra {name!r}. Nearest: {close}.")
    missing = [name for name in dict.fromkeys(wanted) if not known[name]["installed"]]
    if missing:
        packages = ", ".join(package for name in missing for package in known[name]["missing"])
        raise MissingExtra(f'{packages} not installed. Run: pip install "featherweight[{",".join(missing)}]"')


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _new_enough(version: str, wanted: str) -> bool:
    """Whether a version meets `>=1.23`, the only form that this project's metadata has."""
    least = re.fullmatch(r">=([\d.]+)", wanted)
    return least is None or _numbers(version) >= _numbers(least[1])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


def _accelerates(flags: Sequence[str]) -> list[str]:
    said = []
    for names, what in _GAINS:
        there = [name for name in names if name in flags]
        said.append(f"{what}: {', '.join(there)}" if there else f"{what}: nothing that helps was found")
    return said


def _runtimes() -> dict[str, dict[str, Any]]:
    """Each runtime that is installed, imported to see that it works: a package may be there and broken."""
    found = {}
    for name, (extra, facts) in _RUNTIMES.items():
        package = _PACKAGES.get(name, name)
        if importlib.util.find_spec(package) is None:
            found[name] = {"works": False, "facts": f'not installed. Run: pip install "featherweight[{extra}]"'}
            continue
        try:
            found[name] = {"works": True, "facts": facts(require(package, extra))}
        except Exception as error:  # whatever a broken installation raises is the finding
            found[name] = {"works": False, "facts": f"installed but broken: {type(error).__name__}: {error}"}
    return found


def _torch(torch: Any) -> str:
    return f"{torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()} kernels"


def _engine(core: Any) -> str:
    return f"{_version('featherweight-engine')}, {', '.join(core.instruction_sets())}; {len(core.op_names())} ops"


def _onnxruntime(onnxruntime: Any) -> str:
    providers = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
    return f"{onnxruntime.__version__}, providers {', '.join(providers)}"


def _openvino(openvino: Any) -> str:
    return f"{openvino.__version__.partition('-')[0]}, devices {', '.join(openvino_core().available_devices)}"


_RUNTIMES: Mapping[str, tuple[str, Callable[[Any], str]]] = {
    "torch": ("", _torch),
    "engine": ("engine", _engine),
    "onnxruntime": ("onnx", _onnxruntime),
    "openvino": ("openvino", _openvino),
}


# Where a runtime's package has another name.
_PACKAGES = {"engine": "featherweight_engine"}


def _writable(folder: Path) -> dict[str, Any]:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return {"folder": str(folder.resolve()), "works": True, "error": None}
    except OSError as error:
        return {"folder": str(folder), "works": False, "error": error.strerror or str(error)}


def _methods() -> list[str]:
    from featherweight.recipe import method_names

    return list(method_names())
