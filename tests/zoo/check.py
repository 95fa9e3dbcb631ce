# SPDX-License-Identifier: Apache-2.0
"""One architecture through all that a user would do with it: `python -m tests.zoo.check LABEL FOLDER`.

Combed; every group cut by one coupling and by 30 %, each on a fresh copy; everything cut by 30 % at once, trained for a
step, saved, loaded in a fresh process, exported to ONNX. What the model's own code refuses is cut on the exported
program. What comes out is one dict of plain facts, for the page.

`cut` proves each cut by itself. What it lets pass is checked once more here, against another oracle: the uncut model
with zeros in place of what was cut. It is exact where no norm's statistics change, and is asked only there.
"""

from __future__ import annotations

import copy
import json
import sys
import sysconfig
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from featherweight import load, save
from featherweight.edits import cut, cut_exported, refusals
from featherweight.errors import FeatherweightError
from featherweight.graph import Coupling, Group, Trace, trace
from tests.zoo.architectures import Inputs, find

__all__ = ["against_zeros", "check", "coverage", "cut_share", "outputs", "train_one_step", "untouched"]

SHARE = 0.3
# Sums of float64 in another order differ by this much over a whole network, and wrong cuts by a million times more.
TOLERANCE = 1e-7

Facts = dict[str, Any]


def check(label: str, folder: Path, *, groups: bool = True, export: bool = True) -> Facts:
    """All facts on one architecture. Errors become facts: this raises nothing that a model or a cut could cause."""
    model, inputs = find(label).make()
    facts: Facts = {"label": label, "source": find(label).source, "parameters": _count(model)}
    found = _timed(facts, "trace", lambda: trace(model, inputs))
    if found is None:
        return facts
    facts["trace"] |= _describe(found)
    facts["groups"] = [_check_group(model, inputs, found, group) for group in found.groups if groups]
    in_code, anywhere = _left_out(facts, model, inputs, found)
    facts["trace"] |= {"in_code": coverage(model, found, in_code), "coverage": coverage(model, found, anywhere)}
    facts["trace"] |= {"left_out": in_code, "left_out_of_program": anywhere}
    _check_all(facts, model, inputs, found, folder, export)
    if in_code:
        _check_program(facts, model, inputs, found, folder, export)
    return facts


def _left_out(facts: Facts, model: nn.Module, inputs: Inputs, found: Trace) -> tuple[list[str], list[str]]:
    """Groups that the model's own code cannot do without, and those of them that the exported program cannot either."""
    if not facts["groups"]:
        return list(refusals(model, found, inputs)), []
    refused = [each for each in facts["groups"] if "refused" in (each["one"]["outcome"], each["share"]["outcome"])]
    return [each["name"] for each in refused], [
        each["name"] for each in refused if each["exported"]["outcome"] != "passed"
    ]


def _check_all(facts: Facts, model: nn.Module, inputs: Inputs, found: Trace, folder: Path, export: bool) -> None:
    """30 % of all groups at once, in the model's own code; and what one does with the model then."""
    pruned = copy.deepcopy(model)
    made = _timed(facts, "everything", lambda: cut_share(pruned, inputs, found, facts["trace"]["left_out"]))
    if made is None:
        return
    facts["everything"] |= {"parameters": _count(pruned), **against_zeros(model, pruned, inputs, found, made[1])}
    _timed(facts, "artefact", lambda: _save(pruned, made[0].plan, inputs, facts["label"], folder))
    trained = copy.deepcopy(pruned)
    if _timed(facts, "training", lambda: train_one_step(trained, inputs)) is None:
        _timed(facts, "training_uncut", lambda: train_one_step(copy.deepcopy(model), inputs))
    if export and _timed(facts, "onnx", lambda: _export(pruned, inputs, folder)) is None:
        _timed(facts, "onnx_uncut", lambda: _export(model, inputs, folder))


def _check_program(facts: Facts, model: nn.Module, inputs: Inputs, found: Trace, folder: Path, export: bool) -> None:
    """The same on the exported program, which has no code that could refuse."""
    without = facts["trace"]["left_out_of_program"]
    couplings = [one for group in found.groups if group.name not in without for one in some(group, SHARE)]
    made = _timed(facts, "program", lambda: cut_exported(model, couplings, inputs, trace=found))
    if made is None:
        return
    facts["program"] |= {"parameters": _count(made.program)}
    facts["program"] |= against_zeros(model, made.program, inputs, found, couplings)
    if export and _timed(facts, "program_onnx", lambda: _export(made.program, inputs, folder)) is None:
        _timed(facts, "program_onnx_uncut", lambda: _export(model, inputs, folder))


def cut_share(
    model: nn.Module, inputs: Inputs, found: Trace, without: Sequence[str] = ()
) -> tuple[Any, list[Coupling]]:
    """Cuts 30 % out of every group at once, in place; gives what `cut` gave, and the couplings. Groups that the model's
    own code cannot do without are known by then, and left out."""
    groups = [group for group in found.groups if group.name not in without]
    couplings = [coupling for group in groups for coupling in some(group, SHARE)]
    return cut(model, couplings, trace=found, inputs=inputs), couplings


def some(group: Group, share: float, seed: int = 0) -> list[Coupling]:
    """Couplings drawn at random, so that neither the first nor the last are always among them; at least one stays."""
    count = min(max(1, round(share * group.size)), group.size - 1)
    chosen = np.random.default_rng([seed, group.size]).choice(group.size, size=count, replace=False)
    return [group[int(index)] for index in sorted(chosen)]


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All tensors that it answers with; from one seed, since some networks draw lots in eval mode too."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        answer = model(*inputs) if isinstance(inputs, tuple) else model(**inputs)
    return [leaf for leaf in tree_leaves(answer) if isinstance(leaf, Tensor)]


def train_one_step(model: nn.Module, inputs: Inputs) -> Facts:
    """One step of SGD on the mean square of all outputs. Raises `ArithmeticError` where a parameter is no longer finite."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    answer = model(*inputs) if isinstance(inputs, tuple) else model(**inputs)
    leaves = [leaf for leaf in tree_leaves(answer) if isinstance(leaf, Tensor) and leaf.requires_grad]
    loss = torch.stack([leaf.float().square().mean() for leaf in leaves]).sum()
    loss.backward()
    optimizer.step()
    model.eval()
    wild = [name for name, parameter in model.named_parameters() if not bool(torch.isfinite(parameter).all())]
    if wild:
        raise ArithmeticError(f"not finite after a step: {', '.join(wild[:3])}")
    outputs(model, inputs)
    return {"loss": float(loss.detach())}


def coverage(model: nn.Module, found: Trace, without: Sequence[str] = ()) -> float:
    """Share of the parameters of conv and linear weights that some coupling would take along, counted entry by entry;
    `without` names groups that do not count, since their cuts were refused."""
    cuttable: dict[tuple[str, int], set[int]] = {}
    for group in found.groups:
        for member in group.members if group.name not in without else ():
            cuttable.setdefault((member.tensor, member.axis), set()).update(member.positions.flatten().tolist())
    total = covered = 0.0
    for name, shape in _weights(model, found).items():
        stays = 1.0
        for axis, size in enumerate(shape):
            stays *= 1.0 - len(cuttable.get((name, axis), ())) / size
        entries = float(np.prod(shape))
        total, covered = total + entries, covered + (1.0 - stays) * entries
    return covered / total if total else 0.0


def _weights(model: nn.Module, found: Trace) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of conv and linear weights; of tied ones the first name, and experts' weights held bare as well."""
    first: dict[int, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            first.setdefault(id(parameter), f"{name}.{key}".removeprefix("."))
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) or type(module).__name__ == "Conv1D":
            weight = module.weight
            shapes[first.get(id(weight), f"{name}.weight")] = tuple(weight.shape)
    used = {op.weight for op in found.ops if op.weight and op.op not in ("embedding", "lstm", "gru")}
    experts = {name: shape for name, shape in found.shapes.items() if name in used and len(shape) > 1}
    return experts | shapes


def _check_group(model: nn.Module, inputs: Inputs, found: Trace, group: Group) -> Facts:
    facts: Facts = {"name": group.name, "kind": group.kind, "size": group.size, "statistics": len(group.statistics)}
    for name, share in (("one", 0.0), ("share", SHARE)):
        twin, couplings = copy.deepcopy(model), some(group, share, seed=len(group.name))
        made = _timed(facts, name, lambda: cut(twin, couplings, trace=found, inputs=inputs))  # noqa: B023
        if made is not None:
            facts[name] |= against_zeros(model, twin, inputs, found, couplings)
        elif not untouched(model, twin):
            facts[name] |= {"outcome": "wrong", "reason": "the model changed although the cut was refused"}
    if "refused" in (facts["one"]["outcome"], facts["share"]["outcome"]):
        couplings = some(group, SHARE, seed=len(group.name))
        made = _timed(facts, "exported", lambda: cut_exported(model, couplings, inputs, trace=found))
        facts["exported"] |= {} if made is None else against_zeros(model, made.program, inputs, found, couplings)
    return facts


def against_zeros(
    model: nn.Module, pruned: nn.Module, inputs: Inputs, found: Trace, couplings: Sequence[Coupling]
) -> Facts:
    """The largest difference, over the largest value, from the uncut model with zeros for what was cut; in float64."""
    if any(found[coupling.group].statistics for coupling in couplings):
        return {}
    masked = copy.deepcopy(model).double()
    state = masked.state_dict(keep_vars=True)
    for coupling in couplings:
        for member in found[coupling.group].members:
            if member.tensor not in state:
                return {}  # a weight that is computed from others has no entries of its own to set
            rows = torch.from_numpy(np.asarray(member.positions[coupling.index]))
            with torch.no_grad():
                state[member.tensor].index_fill_(member.axis, rows, 0.0)
    double = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
    try:
        before, after = outputs(masked, double), outputs(copy.deepcopy(pruned).double(), double)
    except RuntimeError as error:  # some models make float32 tensors of their own
        return {"zeros": f"not compared: {error}"[:200]}
    return _difference(before, after)


def _difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> Facts:
    worst = 0.0
    for one, other in zip(before, after, strict=True):
        if one.shape != other.shape:
            return {"outcome": "wrong", "reason": f"an output of {tuple(one.shape)} became {tuple(other.shape)}"}
        if one.is_floating_point() and one.numel():
            apart = float((one - other).abs().max()) / max(float(one.abs().max()), 1e-6)
            if not apart <= TOLERANCE:  # not a number is not equal either
                return {"zeros": str(apart), "outcome": "wrong", "reason": f"{apart:.1e} from the model with zeros"}
            worst = max(worst, apart)
    return {"zeros": worst}


def _save(model: nn.Module, plan: Any, inputs: Inputs, label: str, folder: Path) -> Facts:
    save(model, plan, folder / "artefact", overwrite=True)
    torch.save(outputs(model, inputs), folder / "outputs.pt")
    return {"edits": len(plan.edits)}


def loads_equal(label: str, folder: Path) -> Facts:
    """In a fresh process: the artefact, loaded into a fresh model, answers to the last bit as the one that was saved."""
    facts: Facts = {}
    model, inputs = find(label).make()
    if _timed(facts, "loaded", lambda: load(model, folder / "artefact")) is not None:
        expected = torch.load(folder / "outputs.pt", weights_only=True)
        equal = all(torch.equal(a, b) for a, b in zip(outputs(model, inputs), expected, strict=True))
        facts["loaded"] |= {} if equal else {"outcome": "wrong", "reason": "the loaded model answers otherwise"}
    return facts


class _Positional(nn.Module):
    """The exporter takes inputs by position."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *values: Tensor) -> Any:
        return self.model(**dict(zip(self.names, values, strict=True)))


def _export(model: nn.Module, inputs: Inputs, folder: Path) -> Facts:
    from featherweight.deploy import check_parity, export_onnx, sample_inputs

    if isinstance(inputs, dict):
        model, inputs = _Positional(model, tuple(inputs)), tuple(inputs.values())
    written = export_onnx(model, inputs, folder / "model.onnx", dynamic_batch=False)
    found = check_parity(model, written.path, sample_inputs(model, inputs, count=2))
    return {"exporter": written.exporter, "difference": found.max_rel_diff}


def _describe(found: Trace) -> Facts:
    reasons: Counter[str] = Counter()
    for frozen in found.frozen:
        reasons[f"{frozen.op}: {frozen.reason} ({frozen.source})"] += frozen.positions
    return {
        "front": found.front,
        "coverage_by_trace": found.coverage,
        "groups": len(found.groups),
        "couplings": sum(group.size for group in found.groups),
        "frozen": reasons.most_common(12),
        "notes": list(found.notes),
    }


def _timed(facts: Facts, name: str, work: Callable[[], Any]) -> Any:
    """Runs it and notes how long it took and how it ended: None where it did not end well."""
    start = time.perf_counter()
    try:
        result = work()
        facts[name] = {"outcome": "passed", **(result if isinstance(result, dict) else {})}
    except FeatherweightError as error:
        result = None
        facts[name] = {"outcome": "refused", "error": type(error).__name__, "reason": _told(error)}
    except Exception as error:
        result = None
        facts[name] = {"outcome": "crashed", "reason": f"{type(error).__name__}: {_told(error)}", "at": _where(error)}
    facts[name]["seconds"] = round(time.perf_counter() - start, 3)
    return result


def _told(error: BaseException) -> str:
    """What it says, without where this machine keeps its packages."""
    return str(error).replace(f"{sysconfig.get_path('purelib')}/", "")[:1000]


def _where(error: BaseException) -> list[str]:
    frames = traceback.extract_tb(error.__traceback__)
    return [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames[-6:]]


def untouched(model: nn.Module, twin: nn.Module) -> bool:
    ours, theirs = model.state_dict(), twin.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def main(arguments: Sequence[str]) -> None:
    label, folder = arguments[0], Path(arguments[1])
    torch.set_num_threads(1)
    if "--load" in arguments:
        facts = loads_equal(label, folder)
    else:
        facts = check(label, folder, groups="--no-groups" not in arguments, export="--no-export" not in arguments)
    (folder / "facts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
