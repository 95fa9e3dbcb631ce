# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.comb.peers`: half of all channels cut by Torch-Pruning and by featherweight, side by side.

The same networks (the patterns of tests/graph and twenty of the zoo), the same judge for both: the uncut network run with
what is gone marked as absent (tests/graph/absent.py), in float64. What a tool took out is read off the values that are
left, every one of which is unique, so that neither tool's own book-keeping is believed.

Torch-Pruning is told what a user would tell it: which layers make the outputs, how many heads a projection has; it is
tried with heads and with their dimensions cut, and the better result counts. Its forwards are not patched by hand.
What comes out is `exact`, `wrong` (it runs, and answers something else), `breaks` (what is left does not run), `hangs`,
`stops` (with an error, and the network as it was) or `nothing` (was cut). Torch-Pruning is no dependency:
`pip install --no-deps --target FOLDER torch-pruning==1.6.1`, and `--torch-pruning FOLDER`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.graph.absent import bake, run, without
from tests.graph.patterns import PATTERNS, build
from tests.zoo.architectures import find
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from benchmarks.comb.pages import put
from benchmarks.comb.peers_page import NETWORKS, TOOLS, Row, page

RESULTS = Path(__file__).parent / "results" / "peers.json"
LIMIT = 90.0  # seconds a network
TOLERANCE = 1e-9
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
PROJECTIONS = (
    "q",
    "k",
    "v",
    "qkv",
    "query",
    "key",
    "value",
    "q_proj",
    "k_proj",
    "v_proj",
    "q_lin",
    "k_lin",
    "v_lin",
    "c_attn",
)

Inputs = tuple[Any, ...] | dict[str, Any]
Tool = Callable[[list[nn.Module], Inputs, list[str]], list[nn.Module]]


def main(words: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--torch-pruning", metavar="FOLDER", help="where it was installed")
    options.add_argument("--only", nargs="*", help="names of networks, as in the results")
    options.add_argument("--tools", nargs="*", default=TOOLS, choices=TOOLS)
    options.add_argument("--table", action="store_true", help="write the table from the results that are there")
    given = options.parse_args(words)
    if not given.table:
        names = given.only or [f"pattern/{name}" for name in PATTERNS] + [f"network/{name}" for name in NETWORKS]
        for tool in given.tools:
            for row in measured(tool, names, given.torch_pruning):
                keep(row)
                print(json.dumps(row), flush=True)
    put("peers", page(there()))


def there() -> dict[str, Row]:
    return json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else {}


def keep(row: Row) -> None:
    """Results are written as they come: what was stopped is not lost."""
    rows = there() | {f"{row['tool']} {row['name']}": row}
    machine = {"torch": torch.__version__, "python": platform.python_version(), "torch_pruning": "1.6.1"}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        json.dumps({"machine": machine, "limit_seconds": LIMIT, "rows": dict(sorted(rows.items()))}, indent=1) + "\n"
    )


# Running ---------------------------------------------------------------------------------------------------------


def measured(tool: str, names: list[str], folder: str | None) -> Iterator[Row]:
    """A process does one network after another; when one takes too long, a new process goes on with the next."""
    context = multiprocessing.get_context("spawn")
    left = list(names)
    while left:
        ours, theirs = context.Pipe()
        worker = context.Process(target=work, args=(tool, left, folder, theirs), daemon=True)
        worker.start()
        theirs.close()
        ready = ours.poll(300) and ours.recv()
        while left and ready:
            row = received(ours)
            yield row or {"tool": tool, "name": left[0], "verdict": "hangs" if worker.is_alive() else "breaks", "why": f"no answer in {LIMIT:.0f} s" if worker.is_alive() else "the process died"}  # fmt: skip
            left.pop(0)
            if row is None:
                break
        worker.terminate()
        worker.join()
        if not ready:
            raise SystemExit(f"{tool} could not be started")


def received(pipe: Any) -> Row | None:
    try:
        return pipe.recv() if pipe.poll(LIMIT) else None
    except EOFError:
        return None


def work(tool: str, names: list[str], folder: str | None, pipe: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if folder:
        sys.path.append(folder)
    cut: Tool = by_torch_pruning if tool == "torch-pruning" else by_featherweight
    judged("pattern/mlp", cut)  # what is imported when it is first needed is nobody's time
    pipe.send(True)
    for name in names:
        pipe.send({"tool": tool, "name": name, **judged(name, cut)})


def network(name: str) -> tuple[nn.Module, Inputs]:
    """The network in float64, all of its values unique, and its inputs."""
    kind, _, label = name.partition("/")
    model, inputs = build(label) if kind == "pattern" else find(label).make()
    model = model.double()
    inputs = tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, inputs)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1 + 1e-4 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))
    return model, inputs


def judged(name: str, cut: Tool) -> Row:
    models, inputs = [network(name)[0] for _ in range(2)], network(name)[1]
    before = sum(p.numel() for p in models[0].parameters())
    try:
        outputs = making_outputs(*network(name))
    except Exception:  # it is help for one of the tools, outside of its time; without it, nothing is named
        outputs = []
    start = time.perf_counter()
    try:
        candidates = cut(models, inputs, outputs)
    except Exception as error:  # whatever a tool raises is its result
        whole = all(untouched(name, model) for model in models)
        found = {"verdict": "stops" if whole else "breaks", "why": short(error)}
        return found | {"seconds": round(time.perf_counter() - start, 2)}
    seconds = round((time.perf_counter() - start) / len(candidates), 2)
    left = [sum(p.numel() for p in candidate.parameters()) / before for candidate in candidates]
    rows = [judge(name, each) | {"left": share} for each, share in zip(candidates, left, strict=True)]
    order = ("exact", "wrong", "breaks", "nothing")
    return min(rows, key=lambda row: (order.index(row["verdict"]), row["left"])) | {
        "seconds": seconds,
        "parameters": before,
    }


def judge(name: str, after: nn.Module) -> Row:
    """Exact, wrong, or not running: against the network with what is gone from it absent."""
    model, inputs = network(name)
    try:
        answers = run(after.eval(), inputs)
        bake(after)
    except Exception as error:  # as above
        return {"verdict": "breaks", "why": short(error)}
    bake(model)
    gone = makers_gone(model, after)
    if not gone:
        return {"verdict": "nothing", "why": "nothing was cut"}
    expected = without(model, inputs, gone)
    if [a.shape for a in answers] != [e.shape for e in expected]:
        return {"verdict": "wrong", "why": "outputs have another shape"}
    error = max(
        float((a - e).abs().max() / (e.abs().max() + 1e-30))
        for a, e in zip(answers, expected, strict=True)
        if e.is_floating_point()
    )
    return {"verdict": "exact" if error < TOLERANCE else "wrong", "error": error}


def untouched(name: str, model: nn.Module) -> bool:
    """Whether a network is as it was before a tool gave up on it."""
    before = network(name)[0].state_dict()
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(now[key], before[key]) for key in before)


def short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else ''}"


# What is gone ----------------------------------------------------------------------------------------------------


def makers_gone(before: nn.Module, after: nn.Module) -> list[tuple[str, int, list[int]]]:
    """Where channels are made: the positions none of whose values is anywhere in the cut network."""
    left = np.unique(np.concatenate([t.detach().reshape(-1).numpy() for t in tensors(after).values()]))
    found = []
    for name, tensor in tensors(before).items():
        stays = np.isin(tensor.detach().numpy(), left)
        if stays.all() or not stays.any():  # nothing is gone, or its values were computed anew
            continue
        for axis in made(before, name, tensor):
            rows = np.moveaxis(stays, axis, 0).reshape(tensor.shape[axis], -1).any(1)
            if not rows.all():
                found.append((name, axis, np.flatnonzero(~rows).tolist()))
    return found


def tensors(model: nn.Module) -> dict[str, Tensor]:
    every = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name: tensor for name, tensor in every if tensor.is_floating_point()}


def made(model: nn.Module, name: str, tensor: Tensor) -> tuple[int, ...]:
    """The axes on which a tensor makes channels, as against reading them."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, nn.modules.conv._ConvTransposeNd) and tensor.ndim > 1:
        return (0,) if owner.groups == owner.in_channels > 1 else (1,)
    if isinstance(owner, nn.modules.conv._ConvNd | nn.Linear | nn.RNNBase | nn.MultiheadAttention | nn.Bilinear):
        return (0,)
    if isinstance(owner, nn.Embedding) or type(owner).__name__ == "Conv1D":
        return (tensor.ndim - 1,)
    return tuple(range(tensor.ndim))


# The tools -------------------------------------------------------------------------------------------------------


def by_featherweight(models: list[nn.Module], inputs: Inputs, outputs: list[str]) -> list[nn.Module]:
    """Half of every group, drawn at random; the cut is proved, which is part of its time. What `cut` says that it cannot
    carry out in the network's own code is left out, by `refusals`."""
    from featherweight.edits import cut, refusals
    from featherweight.errors import FeatherweightError
    from featherweight.graph import trace

    candidates, errors = [], []
    for grain, model in zip(("heads", "dims") if heads(models[0]) else ("heads",), models, strict=False):
        try:
            found = trace(model, inputs, grain=grain)
            chance = np.random.default_rng(0)
            halves = {g.name: [g[int(i)] for i in chance.permutation(g.size)[: g.size // 2]] for g in found.groups}
            try:
                cut(model, itertools.chain(*halves.values()), trace=found, inputs=inputs)
            except FeatherweightError:
                left = halves.keys() - refusals(model, found, inputs).keys()
                if not left:
                    raise
                cut(model, itertools.chain(*(halves[name] for name in left)), trace=found, inputs=inputs)
            candidates.append(model)
        except FeatherweightError as error:  # the other way may do
            errors.append(error)
    if not candidates:
        raise errors[0]
    return candidates


def by_torch_pruning(models: list[nn.Module], inputs: Inputs, outputs: list[str]) -> list[nn.Module]:
    """The smallest half of every group by L2 norm: with the dimensions of heads cut, and with whole heads."""
    import torch_pruning as tp

    candidates, errors = [], []
    ways = (False, True) if heads(models[0]) else (False,)
    for whole, one in zip(ways, models, strict=False):
        ignored = [one.get_submodule(name) for name in outputs]
        try:
            tp.pruner.BasePruner(
                one,
                inputs,
                importance=tp.importance.GroupMagnitudeImportance(p=2),
                pruning_ratio=0.5,
                ignored_layers=ignored,
                num_heads=heads(one),
                prune_num_heads=whole,
                prune_head_dims=not whole,
                head_pruning_ratio=0.5 if whole else 0.0,
            ).step()
            candidates.append(one)
        except Exception as error:  # the other way may do
            errors.append(error)
    if not candidates:
        raise errors[0]
    return candidates


def making_outputs(model: nn.Module, inputs: Inputs) -> list[str]:
    """Layers whose rows are seen to be outputs: absent, they leave outputs absent."""
    from featherweight.graph import trace

    frozen = trace(model, inputs).frozen
    layers = dict(model.named_modules())
    names = {f.tensor.rpartition(".")[0] for f in frozen if f.op == "output" and f.tensor.endswith(".weight")}
    return [name for name in sorted(names) if isinstance(layers.get(name), nn.Linear | nn.modules.conv._ConvNd)]


def heads(model: nn.Module) -> Mapping[nn.Module, int]:
    found: dict[nn.Module, int] = {}
    for module in model.modules():
        count = next((getattr(module, name) for name in HEADS if isinstance(getattr(module, name, None), int)), None)
        for name, layer in module.named_children():
            if isinstance(layer, nn.Linear) and name in PROJECTIONS:
                few = getattr(module, "num_key_value_heads", None) or count
                number = few if name.startswith(("k", "v")) else count
                if number is None and name in "qkv" and layer.out_features % 4 == 0:
                    number = layer.out_features // 4  # the patterns' heads are of four dimensions
                if number:
                    found[layer] = number
    return found


if __name__ == "__main__":
    main()
