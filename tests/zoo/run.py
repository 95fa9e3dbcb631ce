# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.zoo.run [LABEL ...]`: the whole zoo, a fresh process and a time limit for each, and docs/zoo.md.

Goes on where it stopped: what has a result of this very code is not run again, unless it is named.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import resource
import signal
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tests.zoo.architectures import architectures
from tests.zoo.page import write

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"

# Each child starts as a copy of a process that has imported and done nothing else: imports would take half of the time.
PROCESSES = multiprocessing.get_context("forkserver")
PRELOAD = ["tests.zoo.check", "transformers.modeling_utils", "networkx", "torch.onnx", "onnxscript", "onnxruntime"]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}

# On a machine that others use as well, seconds pass that are not ours; only a process that waits for nothing sees this end.
PATIENCE = 20

Facts = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    options.results.mkdir(parents=True, exist_ok=True)
    os.environ.update(ENVIRONMENT)
    PROCESSES.set_forkserver_preload(PRELOAD)
    labels = [architecture.label for architecture in architectures()]
    options.code = _code()
    todo = options.labels or [name for name in labels if not _has_result(name, options)]
    with ThreadPoolExecutor(options.workers) as pool:
        for done in as_completed([pool.submit(_one, label, options) for label in todo]):
            facts = done.result()
            print(
                f"{facts['label']:24} {facts['outcome']:10} {facts['seconds']:6.1f} s  {facts['reason'][:160]}",
                flush=True,
            )
            _write_page(labels, options)
    _write_page(labels, options)
    print(options.page)


def _write_page(labels: Sequence[str], options: argparse.Namespace) -> None:
    paths = [_result(options.results, label) for label in labels]
    speed = options.results / "speed" / "speed.json"
    found = [json.loads(path.read_text()) for path in paths if path.exists()]
    write(found, options.page, json.loads(speed.read_text()) if speed.exists() else ())


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.run", description=__doc__)
    parser.add_argument("labels", nargs="*", help="architectures to run, again if need be; all that have no result")
    parser.add_argument("--keep", action="store_true", help="keep results of earlier code as well")
    parser.add_argument(
        "--seconds", type=float, default=300.0, help="limit of one architecture, in seconds of one core"
    )
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="architectures at a time")
    parser.add_argument("--no-groups", action="store_true", help="cut everything at once only, and no group by itself")
    parser.add_argument("--no-export", action="store_true", help="leave ONNX out")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "zoo.md", help="page whose table is written")
    return parser.parse_args(arguments)


def _result(folder: Path, label: str) -> Path:
    return folder / f"{label}.json"


def _code() -> str:
    """What the results depend on: the library's source, and this folder's."""
    digest = hashlib.sha256()
    for file in sorted([*(ROOT / "src" / "featherweight").rglob("*.py"), *Path(__file__).parent.rglob("*.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _has_result(label: str, options: argparse.Namespace) -> bool:
    path = _result(options.results, label)
    return path.exists() and (options.keep or json.loads(path.read_text()).get("code") == options.code)


def _one(label: str, options: argparse.Namespace) -> Facts:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
        flags = ["--no-groups"] * options.no_groups + ["--no-export"] * options.no_export
        facts = _process(label, Path(folder), options.seconds, flags)
        if facts.get("artefact", {}).get("outcome") == "passed":
            facts |= {"loaded": {"outcome": "crashed", "reason": "no answer"}}
            facts |= _process(label, Path(folder), options.seconds, ["--load"])
    facts |= verdict(facts) | {"seconds": round(time.perf_counter() - start, 1), "code": options.code}
    _result(options.results, label).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


def _process(label: str, folder: Path, seconds: float, flags: Sequence[str]) -> Facts:
    """What one fresh process finds out; a hang or the process's death is a fact as well."""
    child = PROCESSES.Process(target=_child, args=(label, folder, seconds, flags))
    child.start()
    child.join(PATIENCE * math.ceil(seconds))
    if child.is_alive() or child.exitcode == -signal.SIGXCPU:
        child.kill()
        child.join()
        return {"label": label, "process": {"outcome": "hung", "reason": f"no answer in {seconds:.0f} s"}}
    if child.exitcode == 0 and (folder / "facts.json").exists():
        return json.loads((folder / "facts.json").read_text())
    last = (folder / "errors.txt").read_text(errors="replace").strip().splitlines()[-3:]
    return {"label": label, "process": {"outcome": "crashed", "reason": f"exit {child.exitcode}: {' | '.join(last)}"}}


def _child(label: str, folder: Path, seconds: float, flags: Sequence[str]) -> None:
    from tests.zoo import check

    limit = math.ceil(seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 10))
    (folder / "facts.json").unlink(missing_ok=True)
    with open(folder / "errors.txt", "w") as errors, open(os.devnull, "w") as nowhere:
        os.dup2(errors.fileno(), 2)
        os.dup2(nowhere.fileno(), 1)
        check.main([label, str(folder), *flags])


def verdict(facts: Facts) -> Facts:
    """One word for an architecture, and why: the worst of its outcomes, a group that is refused by itself apart: that is
    safe, told, and left out of the rest. Nor is a step counted that the uncut model fails as well."""
    names = ("process", "trace", "everything", "artefact", "loaded", "training", "onnx", "program", "program_onnx")
    steps = {name: facts[name] for name in names if name in facts}
    for group in facts.get("groups", ()):
        cuts = {f"{group['name']}, {way}": group[way] for way in ("one", "share", "exported") if way in group}
        steps |= {name: made for name, made in cuts.items() if made["outcome"] != "refused"}
    for name in ("training", "onnx", "program_onnx"):
        if facts.get(f"{name}_uncut", {}).get("outcome", "passed") != "passed":
            steps.pop(name)
    for outcome in ("wrong", "hung", "crashed", "refused"):
        for name, step in steps.items():
            if step["outcome"] == outcome:
                return {"outcome": outcome, "reason": f"{name}: {step['reason']}"}
    return {"outcome": "passed", "reason": ""}


if __name__ == "__main__":
    main()
