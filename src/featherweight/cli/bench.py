# SPDX-License-Identifier: Apache-2.0
"""`featherweight bench`: models timed side by side, in each runtime that all of them can run in.

All are interleaved call by call on the same number of threads, so that a machine that slows down does so for all.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featherweight.cli import sources
from featherweight.cli.console import Json, say, table
from featherweight.errors import ArtefactError, OptionError, nearest
from featherweight.report import tables, words

if TYPE_CHECKING:
    from torch import Tensor, nn

    from featherweight.measure import Latency

__all__ = ["bench", "command"]


def command(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="A [B]", help="ONNX files, folders of runs, or package.module:factory; A is the baseline."
        ),
    ],
    runtime: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="torch, engine, onnxruntime, openvino, by commas; by default all that can run all models.",
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of every runtime; by default all cores.")] = None,
    input: Annotated[
        list[str] | None,
        typer.Option(
            "--input", metavar="SHAPE", help="An input's shape, 1x3x224x224; by default what an ONNX file says."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Where an ONNX file leaves the batch open.")] = 1,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="package.module:factory that folders are loaded into, for torch.")
    ] = None,
    runs: Annotated[int, typer.Option(min=50, help="Timed calls of each.")] = 100,
    json: Json = False,
) -> dict[str, Any]:
    """Times models side by side: median, 90th percentile, and the ratio to the first one with what it is worth.

    \b
    Example: featherweight bench dense.onnx run/model.onnx --threads 1
    """
    names = None if runtime is None else [name.strip() for name in runtime.split(",") if name.strip()]
    found = bench(models, runtimes=names, threads=threads, inputs=input or (), batch=batch, model=model, runs=runs)
    if not json:
        _show(found)
    return found


def bench(
    models: Sequence[str],
    *,
    runtimes: Sequence[str] | None = None,
    threads: int | None = None,
    inputs: Sequence[str] = (),
    batch: int = 1,
    model: str | None = None,
    runs: int = 100,
) -> dict[str, Any]:
    """Times each of `models` in each runtime, all interleaved; compares each with the first one in the same runtime.

    One model alone is compared with itself in the first runtime. A quantized ONNX file is timed beside itself in
    float32 too, and `integers` tells what each runtime makes of it. `notes` tells what is left out, and what the engine
    hands over.

    Raises `OptionError` where no runtime can run all models, `ArtefactError` for files that are missing.
    """
    from featherweight import deploy, measure

    threads = threads or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as scratch:
        opened = [_Source(name, model, Path(scratch) / f"{index}.onnx") for index, name in enumerate(models)]
        chosen, notes = _runtimes(opened, runtimes)
        examples = sources.parse_inputs(inputs) if inputs else _declared(opened, batch)
        calls: dict[tuple[str, str], Callable[[], Any]] = {}
        engines = []
        for name in chosen:
            for index, source in enumerate(opened):
                session = source.open(name, threads, examples)
                calls[f"{index} {source.name}", name] = _call(session, examples)
                if isinstance(session, deploy.EngineSession):
                    engines.append((session.engine, str(source.onnx), source.name))
        twins = _float_twins(opened, chosen, Path(scratch))
        for (index, name), file in twins.items():
            calls[f"{index} float32", name] = _call(deploy.session(file, name, threads), examples)
        items = int(examples[0].shape[0]) if examples and examples[0].ndim else 1
        timed = measure.time_callables(
            {f"{label} {name}": call for (label, name), call in calls.items()}, threads=threads, batch=items, runs=runs
        )
        notes += [engine.describe().replace(path, name) for engine, path, name in engines]
        sizes = [source.bytes() for source in opened]
        integers = [
            _integers(
                opened[index], name, timed[f"{index} float32 {name}"], timed[f"{index} {opened[index].name} {name}"]
            )
            for index, name in twins
        ]
    rows = []
    for name in chosen:
        first = timed[f"0 {opened[0].name} {chosen[0] if len(opened) == 1 else name}"]
        for index, source in enumerate(opened):
            latency = timed[f"{index} {source.name} {name}"]
            row = {"model": source.name, "runtime": name, "bytes": sizes[index], "latency": latency.to_dict()}
            rows.append({**row, "comparison": None if latency is first else measure.compare(first, latency).to_dict()})
    facts = {"inputs": [list(x.shape) for x in examples], "threads": threads, "rows": rows, "integers": integers}
    return {**facts, "notes": notes, "machine": measure.machine_facts()}


def _float_twins(opened: Sequence[_Source], runtimes: Sequence[str], scratch: Path) -> dict[tuple[int, str], Path]:
    """For each quantized file and each runtime that has integers: the same network in float32."""
    from featherweight import deploy

    found: dict[tuple[int, str], Path] = {}
    for index, source in enumerate(opened):
        in_runtimes = [name for name in runtimes if name in deploy.INTEGER_RUNTIMES]
        if in_runtimes and source.onnx is not None and deploy.is_quantized(source.onnx):
            twin = scratch / f"{index}-float32.onnx"
            deploy.without_integers(source.onnx, twin)
            found |= {(index, name): twin for name in in_runtimes}
    return found


def _integers(source: _Source, runtime: str, before: Latency, after: Latency) -> dict[str, Any]:
    """What the integers of a file are worth in a runtime, and what became of them there."""
    from featherweight import deploy, measure

    form = deploy.form_in(source.onnx or "", runtime)
    comparison = measure.compare(before, after)
    spoken = tables.spoken(runtime)
    verdicts = {
        True: f"{source.name} in {spoken}: its integers are {comparison.words} than the same network in float32.",
        False: f"{source.name} in {spoken}: its integers are {comparison.words} than the same network in float32: keep that.",
        None: f"{source.name} in {spoken}: its integers are {comparison.words}, against the same network in float32.",
    }
    facts = {"model": source.name, "runtime": runtime, "float32": before.to_dict(), "comparison": comparison.to_dict()}
    return {**facts, "form": form.to_dict(), "words": f"{verdicts[comparison.faster]} {form.words}"}


class _Source:
    """One model as it was named, opened in a runtime only when it is asked for."""

    def __init__(self, name: str, factory: str | None, scratch: Path) -> None:
        self.name, self.factory, self.scratch = name, factory, scratch
        path = Path(name)
        self.folder = path if path.is_dir() else None
        self.module: nn.Module | None = None
        self.onnx: Path | None = None
        if path.suffix == ".onnx":
            self.onnx = path
        elif self.folder is not None:
            self.onnx = self.folder / "model.onnx"
        if self.onnx is not None and not self.onnx.is_file() and factory is None:
            raise ArtefactError(f"{self.onnx} is not there. featherweight export writes one.")
        if self.onnx is None:
            self.module = sources.make_model(name)
        elif self.folder is not None and factory is not None:
            from featherweight.artefact import load

            self.module = load(sources.make_model(factory), self.folder)

    def open(self, runtime: str, threads: int, examples: tuple[Tensor, ...]) -> Callable[..., Any]:
        from featherweight import deploy

        if runtime == "torch":
            if self.module is None:
                raise OptionError(self.without_torch())
            return deploy.torch_session(self.module, threads)
        if self.onnx is None or not self.onnx.is_file():
            if self.module is None:
                raise ArtefactError(f"{self.name} has no model.onnx. featherweight export writes one.")
            deploy.export_onnx(self.module, examples, self.scratch)
            self.onnx = self.scratch
        return deploy.session(self.onnx, runtime, threads)

    def without_torch(self) -> str:
        hint = " Give --model package.module:factory." if self.folder is not None else ""
        return f"{self.name} cannot run in torch, which needs the model's class.{hint}"

    def bytes(self) -> int | None:
        """Of the file that ships: the packed one of a folder, else the ONNX file."""
        file = self.onnx if self.folder is None else self.folder / "model.safetensors"
        return file.stat().st_size if file is not None and file.is_file() else None


def _runtimes(opened: Sequence[_Source], wanted: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Those to time, and what is to be said of those that are not."""
    from featherweight.deploy import RUNTIMES, available_runtimes

    known = ("torch", *RUNTIMES)
    for name in wanted or ():
        if name not in known:
            raise OptionError(
                f"--runtime {name!r} is none of {', '.join(known)}. Nearest: {', '.join(nearest(name, known))}."
            )
    classless = next((source for source in opened if source.module is None), None)
    if wanted:
        chosen = list(dict.fromkeys(wanted))
        if classless is None or "torch" not in chosen or chosen == ["torch"]:
            return chosen, []
        chosen.remove("torch")
        return chosen, [f"PyTorch is left out: {classless.without_torch()}"]
    found = [*(["torch"] if classless is None else []), *available_runtimes()]
    if not found:
        raise OptionError('No runtime can run all of these. For ONNX files: pip install "featherweight[onnx]".')
    return found, []


def _declared(opened: Sequence[_Source], batch: int) -> tuple[Tensor, ...]:
    """Inputs of the shapes that the first ONNX file declares."""
    file = next((source.onnx for source in opened if source.onnx is not None and source.onnx.is_file()), None)
    if file is None:
        raise OptionError("Give --input, the shape that the models take: --input 1x3x224x224, say.")
    return sources.declared_inputs(file, batch)


def _call(session: Callable[..., Any], inputs: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: session(*inputs)


def _show(found: Mapping[str, Any]) -> None:
    shapes = ", ".join("x".join(map(str, shape)) for shape in found["inputs"])
    say(f"input {shapes}, {found['threads']} threads, {found['machine']['cpu']}; calls interleaved")
    say()
    rows = [
        [
            row["model"],
            tables.spoken(row["runtime"]),
            words.size(row["bytes"]),
            *(words.milliseconds(row["latency"][key]) for key in ("median_ms", "p90_ms", "first_ms")),
            words.count(row["latency"]["n"]),
            row["comparison"]["words"] if row["comparison"] else "the baseline",
        ]
        for row in found["rows"]
    ]
    table(("model", "runtime", "file", "median", "p90", "first call", "n", ""), rows, right=(2, 3, 4, 5, 6))
    for said in [*(row["words"] for row in found["integers"]), *found["notes"]]:
        say()
        say(said)
