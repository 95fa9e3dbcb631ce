# SPDX-License-Identifier: Apache-2.0
"""What was measured of a run, written down: scorecards, the export and its parity, latencies, and `report.json`.

Measures tell, reports show: this room calls `measure` and `deploy` and lays their facts side by side; it decides
nothing, and no stage calls it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import gzip as gzip_module
import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featherweight import __version__, artefact, deploy, measure, pack
from featherweight.card import card
from featherweight.edits.swap import Attention
from featherweight.errors import FeatherweightError, MissingExtra
from featherweight.layers import call_order, tensors_and_ties, unwrap
from featherweight.measure import Comparison, Latency, Scorecard
from featherweight.plan import Plan
from featherweight.recipe import Recipe, to_toml
from featherweight.report import render
from featherweight.task import Task, describe, tensors_in
from featherweight.verdict import verdict

__all__ = ["Evidence", "StageFacts", "score", "show"]

Tell = Callable[[dict[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class StageFacts:
    """What one stage did: its options, its time, the model's scorecard after it, and what it reported."""

    name: str
    method: str
    options: Mapping[str, Any]
    seconds: float
    scorecard: Scorecard
    messages: tuple[str, ...] = ()
    unmet: tuple[str, ...] = ()
    history: tuple[Mapping[str, Any], ...] = ()
    selection: tuple[Mapping[str, Any], ...] = ()
    solved: tuple[Mapping[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**fields, "scorecard": self.scorecard.to_dict()}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> StageFacts:
        lists = {name: tuple(data[name]) for name in ("messages", "unmet", "history", "selection", "solved")}
        return StageFacts(**{**data, **lists, "scorecard": Scorecard.from_dict(data["scorecard"])})


@dataclasses.dataclass(frozen=True)
class Evidence:
    """All that a finished run hands over to be measured and written down."""

    task: Task
    recipe: Recipe
    model: nn.Module
    plan: Plan
    before: Scorecard
    stages: tuple[StageFacts, ...]
    command: str | None


def score(model: nn.Module, task: Task, hints: Mapping[str, str] | None = None, *, gzip: bool = False) -> Scorecard:
    """A model's scorecard without latencies: counts, exact packed size, and the task's metric where it has one.

    Cost: one counted forward, one coding of all tensors, one `evaluate`; with `gzip`, one pass of gzip -6 as well.
    """
    counts = measure.count(model, task.example_inputs, hints)
    tensors, _ = tensors_and_ties(model)
    packed = sum(form.coded_bytes for form in pack.code(tensors, hints or {}).values())
    return Scorecard(
        parameters=counts.parameters,
        nonzeros=counts.nonzeros,
        macs=counts.macs,
        bops=counts.bops,
        dense_bytes=counts.dense_bytes,
        packed_bytes=packed,
        gzip_bytes=_gzip_bytes(tensors) if gzip else None,
        peak_memory_bytes=counts.peak_memory_bytes,
        latency={},
        metric=_metric(model, task),
        metric_name=task.metric,
        samples=task.samples,
        bits=counts.bits,
        input_bits=counts.input_bits,
    )


def _metric(model: nn.Module, task: Task) -> float | None:
    if task.evaluate is None:
        return None
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), torch.random.fork_rng():
            return float(task.evaluate(model.eval()))
    finally:
        for module, mode in modes.items():
            module.training = mode


def _gzip_bytes(tensors: Mapping[str, Tensor]) -> int:
    """What gzip makes of the dense tensors: the size that needs no codec of ours, for comparison."""

    class Count:
        size = 0

        def write(self, data: bytes) -> int:
            self.size += len(data)
            return len(data)

        def flush(self) -> None: ...

    count = Count()
    with gzip_module.GzipFile(fileobj=count, mode="wb", compresslevel=6, mtime=0) as file:
        for tensor in tensors.values():
            file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return count.size


def show(evidence: Evidence, folder: Path | None, tell: Tell) -> tuple[dict[str, Any], tuple[Scorecard, Scorecard]]:
    """Measures what a run came to, writes the artefact if there is a folder, and gives the report with both scorecards.

    An export, a runtime or a page that fails is a line in the report's warnings; the model and its plan are written.
    """
    task, model, plan = evidence.task, evidence.model, evidence.plan
    warnings = [text for facts in evidence.stages for text in facts.unmet]
    after = score(model, task, plan.formats, gzip=True)
    coded: Mapping[str, pack.Coded] = {}
    if folder is not None:
        coded = artefact.write_model(model, plan, folder)
        after = dataclasses.replace(after, packed_bytes=(folder / artefact.MODEL).stat().st_size)
    export = None if folder is None else _export(evidence, folder, warnings, tell)
    latencies, noise = _latencies(evidence, folder, export, warnings, tell)
    comparisons = {n: measure.compare(first, second, noise=noise[n]) for n, (first, second) in latencies.items()}
    before = dataclasses.replace(evidence.before, latency={name: pair[0] for name, pair in latencies.items()})
    after = dataclasses.replace(after, latency={name: pair[1] for name, pair in latencies.items()})
    report = _report(evidence, before, after, comparisons, export, warnings, coded, folder)
    if folder is not None:
        _write(model, plan, report, folder)
    return report, (before, after)


def _export(evidence: Evidence, folder: Path, warnings: list[str], tell: Tell) -> dict[str, Any] | None:
    tell({"kind": "message", "text": "exporting to ONNX and checking parity in ONNX Runtime"})
    path = folder / "model.onnx"
    path.unlink(missing_ok=True)  # an older run's; a failed export must not leave it standing
    model, inputs = evidence.model, evidence.task.example_inputs
    try:
        data, others = deploy.calibration_inputs(model, evidence.task), deploy.other_sizes(model, evidence.task)
        made = deploy.export_onnx(model, inputs, path, calibration=data, others=others)
        parity = deploy.parity(model, path, deploy.sample_inputs(model, inputs))
    except FeatherweightError as error:
        warnings.append(f"No ONNX file that can be trusted: {error}")
        return {"path": None, "error": str(error)}
    facts = {"path": path.name, "opset": made.opset, "bytes": made.bytes, "dynamic_batch": made.dynamic_batch}
    facts["integers"] = dataclasses.asdict(made.integers)
    if made.integers.any:
        warnings.extend(f"model.onnx: {note}" for note in made.notes)
    if not parity.passed:
        warnings.append(f"model.onnx does not answer as the PyTorch model does: {parity.words} Do not deploy it.")
    return {**facts, "notes": list(made.notes), "error": None, "parity": parity.to_dict()}


def _latencies(
    evidence: Evidence, folder: Path | None, export: Mapping[str, Any] | None, warnings: list[str], tell: Tell
) -> tuple[dict[str, tuple[Latency, Latency]], dict[str, float]]:
    """Before and after in every runtime that is there, all interleaved in one run, and the noise of each runtime.

    The noise is seen, not assumed: the model as it was is timed twice, by two sessions, and by as much as these two
    may differ nothing is claimed of the third. On a machine that is busy with other work that is a lot.
    """
    tell({"kind": "message", "text": "timing before and after, interleaved"})
    inputs = evidence.task.example_inputs
    with _sessions(evidence, folder, export, warnings) as sessions:
        candidates = {
            f"{name} {which}": _call(session, inputs)
            for name, three in sessions.items()
            for which, session in zip(("before", "again", "after"), three, strict=True)
        }
        batch = next((int(x.shape[0]) for x in inputs if isinstance(x, Tensor) and x.ndim), 1)
        timed = measure.time_callables(candidates, batch=batch)
    pairs = {name: (timed[f"{name} before"], timed[f"{name} after"]) for name in sessions}
    controls = {name: measure.compare(timed[f"{name} before"], timed[f"{name} again"]) for name in sessions}
    return pairs, {n: max(measure.NOISE, c.high - 1, 1 / c.low - 1) for n, c in controls.items()}


def _call(session: Callable[..., Any], inputs: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: session(*inputs)


@contextlib.contextmanager
def _sessions(
    evidence: Evidence, folder: Path | None, export: Mapping[str, Any] | None, warnings: list[str]
) -> Iterator[Mapping[str, tuple[Callable[..., Any], ...]]]:
    """By runtime: the model as it was, the same once more, and the model as it is."""
    reference, model = evidence.task.model, evidence.model
    sessions = {"torch": tuple(deploy.torch_session(m) for m in (reference, reference, model))}
    with tempfile.TemporaryDirectory() as scratch:
        if folder is not None and export is not None and export.get("path"):
            dense = Path(scratch) / "before.onnx"
            try:
                others = deploy.other_sizes(reference, evidence.task)
                deploy.export_onnx(reference, evidence.task.example_inputs, dense, others=others)
                for runtime in deploy.available_runtimes():
                    files = (dense, dense, folder / "model.onnx")
                    sessions[runtime] = tuple(deploy.session(file, runtime) for file in files)
            except FeatherweightError as error:
                warnings.append(f"Not timed in every runtime: {error}")
        yield sessions


def _report(
    evidence: Evidence,
    before: Scorecard,
    after: Scorecard,
    comparisons: Mapping[str, Comparison],
    export: Mapping[str, Any] | None,
    warnings: list[str],
    coded: Mapping[str, pack.Coded],
    folder: Path | None,
) -> dict[str, Any]:
    task, recipe = evidence.task, evidence.recipe
    kind = type(task.model)
    return {
        "version": 1,
        "tool": {"name": "featherweight", "version": __version__},
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "title": kind.__name__,
        "higher_is_better": task.higher_is_better,
        "verdict": verdict(before, after, comparisons, task.higher_is_better),
        "stages": [facts.to_dict() for facts in evidence.stages],
        "before": before.to_dict(),
        "after": after.to_dict(),
        "comparisons": {name: comparison.to_dict() for name, comparison in comparisons.items()},
        "layers": _layers(evidence, coded),
        "channels": _channels(evidence),
        "export": export,
        "gains": measure.gains(before, after, comparisons),
        "warnings": warnings,
        "reproduce": {
            "command": evidence.command,
            "recipe": to_toml(recipe.stages, recipe.seed),
            "seed": recipe.seed,
            "versions": _versions(),
            "machine": measure.machine_facts(),
            "data": {name: _fingerprint(getattr(task, name)) for name in ("train", "calibration")},
        },
        "load": {
            "class_hint": f"{kind.__module__}:{kind.__qualname__}",
            "folder": None if folder is None else folder.name,
        },
    }


def _layers(evidence: Evidence, coded: Mapping[str, pack.Coded]) -> list[dict[str, Any]]:
    """One row a layer of the model as it is now, beside its shape before, its codec, and why it was touched or not."""
    counts = measure.count(evidence.model, evidence.task.example_inputs)
    shapes = {name: list(tensor.shape) for name, tensor in evidence.task.model.state_dict().items()}
    chosen = {fact["name"]: fact for facts in evidence.stages for fact in facts.selection}
    rows = []
    for layer in counts.layers:
        names = [name for name in coded if name.rpartition(".")[0] == layer.name]
        weight = f"{layer.name}.weight"
        fact = next((fact for name, fact in chosen.items() if name.rpartition(".")[0] == layer.name), {})
        rows.append(
            {
                "name": layer.name,
                "kind": layer.kind,
                "shape_before": shapes.get(weight),
                "shape_after": None if layer.shape is None else list(layer.shape),
                "parameters": layer.parameters,
                "zeros": layer.parameters - layer.nonzeros,
                "macs": layer.macs,
                "dense_bytes": sum(coded[name].dense_bytes for name in names) if names else layer.dense_bytes,
                "packed_bytes": sum(coded[name].coded_bytes for name in names) if names else None,
                "codec": ", ".join(dict.fromkeys(coded[name].codec for name in names)) or None,
                "action": fact.get("action"),
                "reason": fact.get("reason"),
            }
        )
    return rows


def _channels(evidence: Evidence) -> list[dict[str, Any]]:
    """How wide each layer was and is, in the order in which layers first run; nothing where all are as wide as before.

    Attention heads are told where a method told of them or torch's own layer has them; a width of 0 is a layer that is
    gone.
    """
    reference = unwrap(evidence.task.model)
    now = dict(evidence.model.named_modules())
    order = {name: i for i, name in enumerate(call_order(reference, evidence.task.example_inputs))}
    heads: dict[str, int] = {}
    for fact in (fact for facts in evidence.stages for fact in facts.selection if fact["kind"] == "heads"):
        heads.setdefault(fact["name"].rpartition(".")[0], fact["shape"][0])
    rows = []
    for name, module in sorted(reference.named_modules(), key=lambda pair: order.get(pair[0], len(order))):
        before = measure.width(module)
        if before is None or isinstance(_parent(reference, name), nn.MultiheadAttention):  # one layer to us
            continue
        after = _width_left(now.get(name))
        count = module.num_heads if isinstance(module, nn.MultiheadAttention) else heads.get(name, 0)
        whole = count and count * after % before == 0
        pair = {"before": count, "after": count * after // before} if whole else None
        rows.append({"layer": name, "before": before, "after": after, "heads": pair})
    return rows if any(row["before"] != row["after"] for row in rows) else []


def _parent(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _width_left(module: nn.Module | None) -> int:
    """Of what stands where a layer stood: a factor's second layer, the queries of our attention; 0 of no layer."""
    if isinstance(module, nn.Sequential):
        module = next(reversed(list(module)), None)
    if isinstance(module, Attention):
        module = module.q
    return 0 if module is None else measure.width(module) or 0


def _versions() -> dict[str, str]:
    names = (
        "torch",
        "numpy",
        "safetensors",
        "accelerate",
        "onnx",
        "onnxscript",
        "onnxruntime",
        "openvino",
        "featherweight-engine",
    )
    found = {"featherweight": __version__}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _fingerprint(data: Any) -> dict[str, Any] | None:
    """How many batches, what one looks like, and a hash of one: enough to see that the data is another."""
    if data is None:
        return None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        batch = next(iter(data))
    digest = hashlib.sha256()
    for tensor in tensors_in(batch):
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    length = len(data) if hasattr(data, "__len__") else None
    return {"batches": length, "batch": describe(batch), "sha256": digest.hexdigest()[:16]}


def _write(model: nn.Module, plan: Plan, report: dict[str, Any], folder: Path) -> None:
    """The report in its three forms, then the plan, which makes the folder an artefact."""
    try:
        page = render(report)
    except MissingExtra as error:
        page = None
        report["warnings"].append(f"No report.html: {error}")
        (folder / "report.html").unlink(missing_ok=True)
    artefact.write_text(folder / "report.json", json.dumps(report, indent=1))
    artefact.write_text(folder / "README.md", card(report))
    if page is not None:
        artefact.write_text(folder / "report.html", page)
    artefact.write_plan(model, plan, folder)
