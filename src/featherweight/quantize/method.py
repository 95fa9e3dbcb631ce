# SPDX-License-Identifier: Apache-2.0
"""`Quantize`: fewer bits after training, for weights alone or with grids on what layers read, by a few hundred samples.

Structure first (norms folded, attention opened), then scales that move from where they hurt to where they do not, then
weights, then ranges of activations as the rounded model has them, then biases. Each step sees what the earlier ones
left.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from featherweight.correct import CORRECTIONS, correct, output_error
from featherweight.edits.effective import reshape_in_place
from featherweight.edits.undo import remember
from featherweight.errors import OptionError, check_strings, check_whole, check_word, is_number
from featherweight.grids import GridSpec
from featherweight.layers import RULES, Calibration, Selected, Weight, draw, refuse_nothing, unwrap
from featherweight.plan import Edit, Plan
from featherweight.quantize.calibrate import Activations, observe, place, saturated
from featherweight.quantize.chosen import Chosen, choose, reading_layers
from featherweight.quantize.equalize import equalize
from featherweight.quantize.links import Link, find_links, is_norm, without
from featherweight.quantize.observers import OBSERVERS
from featherweight.quantize.prepare import fold_norms, open_attention
from featherweight.quantize.rounding import HALVES, Rounded, on_grid, round_weight
from featherweight.quantize.smooth import smooth
from featherweight.task import Stage, Task

__all__ = ["Quantize"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize:
    """Rounds weights to fewer bits, and with `activations` also what layers read, after training and without labels.

    Saves bytes on disk: 32 / bits of each weight. Saves time and memory only in a runtime that computes with integers,
    which needs `activations`; in PyTorch the model computes in floats, and answers as that runtime will.

    - bits: 1 to 16, "fp16", "bf16", or `{glob: bits}` (a later glob overrides an earlier one). At 1 bit a row is ± one
      scale (XNOR-Net, arXiv 1603.05279, eq. 6), which has no zero: a pruned weight is then kept as it is.
    - symmetric: no zero points. `per`: a scale for each output channel, or one for the tensor; or one for every `chunk`
      columns of a row. `search`: the grid of all values (minmax), of a `percentile` of them, or of least error (mse).
    - activations: "static" puts a grid on the first input of every layer whose weights are rounded, with the range that
      `observer` takes of calibration data; "dynamic" takes each call's own range, for linear and recurrent layers.
    - fold: BatchNorm goes into the layer before it. With activations only.
    - equalize: weights of layers in a row are scaled against each other so that their channels have like ranges
      (arXiv 1906.04721, section 4.1). For `per="tensor"`; where rows have scales of their own it mostly does not help.
    - smooth: α of SmoothQuant (arXiv 2211.10438, eq. 4), 0 to 1: activations' outlier channels are scaled down in the
      norm or layer before, and up in the weights that read them. Either leaves the function as it is and weights on a
      grid alone, and is kept where held-out answers of the rounded model come nearer.
    - correct: what is tried afterwards, as in `Reconstruct`, and kept where held-out answers come nearer.
    - layers, keep, dense: which weights, by globs and rules (`first`, `depthwise`, `output`).
    - samples: how many are drawn of the task's calibration data (else of its training data), and `held_out`, the share
      of them that only judges.

    A weight that lies on a grid of at most `bits` already (`Reconstruct(bits=4)`) keeps it. Zeros stay zeros.
    Activations outside the range saturate; how many did on held-out samples is reported, and `featherweight.saturation`
    counts them in any other data. Raises `OptionError`, `DataError` for data that is missing or empty,
    `NothingToCompress`, and `NumericalError` for values that are not finite; the model is then as it was.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> task = Task(model, (torch.zeros(1, 8),), calibration=[torch.randn(32, 8) for _ in range(4)])
    >>> plan = Quantize(8, activations="static")(model, task, Stage())
    >>> plan.formats
    {'0.weight': 'int:8:8', '2.weight': 'int:8:16'}
    >>> plan.edits
    (FakeQuant(layer='0', bits=8, symmetric=False, dynamic=False), FakeQuant(layer='2', bits=8, symmetric=False, dynamic=False))
    """

    bits: int | str | Mapping[str, int | str] = dataclasses.field(default=8, kw_only=False)
    symmetric: bool = True
    per: str = "row"
    chunk: int | None = None
    search: str = "mse"
    activations: str | None = None
    activation_bits: int = 8
    activation_symmetric: bool = False
    observer: str = "minmax"
    percentile: float = 99.99
    fold: bool = True
    equalize: bool = False
    smooth: float | None = None
    correct: Sequence[str] = ("bias",)
    layers: Sequence[str] = ("*",)
    keep: Sequence[str] = ()
    dense: Sequence[str] = ()
    samples: int = 512
    held_out: float = 0.2

    def __post_init__(self) -> None:
        me = type(self).__name__
        for name in ("layers", "keep", "dense", "correct"):
            object.__setattr__(self, name, check_strings(me, name, getattr(self, name)))
        for option, known in (("dense", RULES), ("correct", CORRECTIONS)):
            for word in getattr(self, option):
                check_word(me, option, word, known)
        check_word(me, "per", self.per, ("row", "tensor"))
        check_word(me, "search", self.search, ("mse", "minmax", "percentile"))
        check_word(me, "observer", self.observer, OBSERVERS)
        if self.activations is not None:
            check_word(me, "activations", self.activations, ("static", "dynamic"))
        check_whole(me, "samples", self.samples, least=1)
        self._check_bits(me)
        self._check_shares(me)

    def _check_bits(self, me: str) -> None:
        if isinstance(self.bits, Mapping) and not self.bits:
            raise OptionError(f"{me}: bits is an empty mapping; give {{glob: bits}}, {{'*': 8}} say.")
        for where, bits in self.bits.items() if isinstance(self.bits, Mapping) else [("", self.bits)]:
            name = f"bits of {where!r}" if where else "bits"
            if isinstance(bits, bool) or not (bits in HALVES if isinstance(bits, str) else 1 <= bits <= 16):
                raise OptionError(f"{me}: {name} is a whole number from 1 to 16, 'fp16' or 'bf16'; got {bits!r}.")
            if bits in HALVES and self.activations is not None:
                raise OptionError(
                    f"{me}: {name} is {bits!r}, which integer runtimes do not take; leave activations out."
                )
            if bits in HALVES and (self.chunk is not None or self.per != "row"):
                raise OptionError(f"{me}: {name} is {bits!r}, which has no scales; leave chunk and per out.")
        if type(self.activation_bits) is not int or not 2 <= self.activation_bits <= 16:
            raise OptionError(f"{me}: activation_bits must be 2 to 16; got {self.activation_bits!r}.")
        if self.chunk is not None:
            check_whole(me, "chunk", self.chunk, least=1)
        if self.chunk is not None and self.per == "tensor":
            raise OptionError(f"{me}: chunk says how many columns share a scale, per='tensor' that all do; give one.")

    def _check_shares(self, me: str) -> None:
        if not is_number(self.held_out) or not 0 <= self.held_out < 1:
            raise OptionError(
                f"{me}: held_out is the share of samples that only judge, 0 to below 1; got {self.held_out!r}."
            )
        if not is_number(self.percentile) or not 50 < self.percentile <= 100:
            raise OptionError(f"{me}: percentile must be above 50 and at most 100; got {self.percentile!r}.")
        if self.smooth is not None and (not is_number(self.smooth) or not 0 <= self.smooth <= 1):
            raise OptionError(f"{me}: smooth is SmoothQuant's alpha, 0 to 1; got {self.smooth!r}. 0.5 suits most.")

    def spec(self, bits: int) -> GridSpec:
        """What the grid of a weight of so many bits is to be."""
        return GridSpec(bits, self.symmetric, self.chunk, self.search, percentile=self.percentile)  # type: ignore[arg-type]

    @property
    def reading(self) -> Activations | None:
        """How activations are rounded, if they are."""
        if self.activations is None:
            return None
        return Activations(
            self.activations, self.activation_bits, self.activation_symmetric, self.observer, self.percentile
        )

    def select(self, model: nn.Module, example_inputs: tuple[Any, ...] | None = None) -> tuple[Selected, ...]:
        """What would be rounded and what kept, and why, for every weight. Changes nothing."""
        return choose(unwrap(model), self, example_inputs).lines

    def __call__(self, model: nn.Module, task: Task, stage: Stage) -> Plan:
        model = unwrap(model)
        chosen = choose(model, self, task.example_inputs)
        refuse_nothing(chosen.lines, "quantize")
        data = self._draw(task, stage)
        undo = remember([model])
        try:
            # In memory of their own, so that what was remembered stays as it was.
            for tensor in [*model.parameters(), *model.buffers()]:
                reshape_in_place(tensor, tensor.detach().clone())
            return _Work(self, model, task, stage, data, chosen).plan()
        except BaseException:
            undo()
            raise

    def _draw(self, task: Task, stage: Stage) -> Calibration | None:
        """Calibration samples; None where nothing needs them and the task has none."""
        needed = self.activations == "static" or self.smooth is not None
        if not needed and (not self.correct or (task.calibration is None and task.train is None)):
            return None
        data = draw(task, self.samples, self.held_out, stage.seed)
        for note in data.notes:
            stage.report({"kind": "message", "text": note})
        return data


class _Work:
    """One call of the method: the model as it changes, the edits so far, and what is told of them."""

    def __init__(
        self, options: Quantize, model: nn.Module, task: Task, stage: Stage, data: Calibration | None, chosen: Chosen
    ) -> None:
        self.options, self.model, self.task, self.stage, self.data = options, model, task, stage, data
        self.chosen = chosen
        self.edits: list[Edit] = []

    def tell(self, text: str) -> None:
        self.stage.report({"kind": "message", "text": text})

    def plan(self) -> Plan:
        if self.options.reading is not None:
            self._open()
        self._scale()
        reference = copy.deepcopy(self.model).eval()
        rounded = self._round(self.model, self.tell)
        done = {name: one for name, one in rounded.items() if one.hint}
        self._correct(reference, done)
        for line in self.chosen.told(rounded):
            self.stage.report({"kind": "selection", "weight": dataclasses.asdict(line)})
        return Plan(tuple(self.edits), {name: one.hint for name, one in done.items()})

    def _open(self) -> None:
        """Structure: attention as linear layers, and norms in the layers that they follow."""
        edits, renamed, notes = open_attention(self.model, self.chosen)
        self.chosen = self.chosen.renamed(self.model, renamed)
        if self.options.fold:
            folds, more = fold_norms(self.model, self.task.example_inputs, self.chosen)
            edits, notes = [*edits, *folds], [*notes, *more]
        self.edits += edits
        for note in notes:
            self.tell(note)

    def _round(self, model: nn.Module, tell: Callable[[str], None]) -> dict[str, Rounded]:
        """Weights to their grids and, if asked, grids on what layers read; the model's own edits go into the plan."""
        rounded = {weight.name: round_weight(weight, how) for weight, how in self.chosen.weights(model)}
        reading = self.options.reading
        if reading is not None:
            done = [weight for weight, _ in self.chosen.weights(model) if rounded[weight.name].hint]
            edits = self._read(model, reading, done, tell)
            if model is self.model:
                self.edits += edits
        return rounded

    def _scale(self) -> None:
        """Values only: ranges shared out between layers in a row, and outliers moved from activations into weights.

        Each is tried on a copy, rounded, and kept where held-out answers come nearer; without such samples it is made.
        """
        steps: list[tuple[str, Callable[[nn.Module, list[Link]], float], bool]] = []
        if self.options.equalize:
            steps.append(("equalize", equalize, False))
        if self.options.smooth is not None:
            steps.append(("smooth", self._smooth, True))
        best: float | None = None
        for name, step, norms in steps:
            links = self._links(name, norms)
            if not links:
                continue
            if best is None:
                best = self._error(self.model)
            trial = copy.deepcopy(self.model)
            most = step(trial, links)
            after = self._error(trial)
            kept = after is None or best is None or after < best
            judged = "not judged" if after is None else f"held-out output error {best:.4g} -> {after:.4g}"
            self.tell(
                f"{name}: {len(links)} norms and layers, channels by up to {most:.3g}; {judged}, "
                f"{'kept' if kept else 'not kept'}"
            )
            if kept:
                step(self.model, links)
                best = after

    def _smooth(self, model: nn.Module, links: list[Link]) -> float:
        if self.data is None or self.options.smooth is None:
            return 1.0
        return smooth(model, links, self.data.fit, self.task.forward, self.options.smooth)

    def _error(self, model: nn.Module) -> float | None:
        """The held-out output error that a copy of this model has once rounded; None where nothing is held out."""
        if self.data is None or not self.data.held_out:
            return None
        trial = copy.deepcopy(model)
        self._round(trial, lambda text: None)
        return output_error(trial, self.model, self.data.held_out, self.task.forward)

    def _links(self, name: str, norms: bool) -> list[Link]:
        """Links between what is to be rounded, but for weights that keep a grid; others are told with the reason."""
        pairs = self.chosen.weights(self.model)
        layers = {weight.layer for weight, _ in pairs}
        still = {weight.layer: "keeps its grid" for weight, how in pairs if on_grid(weight, how)}

        def wanted(source: str, module: nn.Module) -> bool:
            return (norms and is_norm(module)) or source in layers

        found, left = find_links(self.model, self.task.example_inputs, wanted, layers)
        links, more = without(found, still)
        if left | more:
            few = [f"{source} ({reason})" for source, reason in (left | more).items()]
            self.tell(_few(f"not scaled to {name}", few))
        return links

    def _read(
        self, model: nn.Module, reading: Activations, done: Sequence[Weight], tell: Callable[[str], None]
    ) -> list[Edit]:
        """Grids on what layers read."""
        layers, floating = reading_layers(model, done, reading.mode)
        seen = {}
        if reading.mode == "static" and self.data is not None:
            seen = observe(model, layers, self.data.fit, self.task.forward)
            unreached = [name for name in layers if name not in seen]
            if unreached:
                tell(_few("left without a grid on what they read, since no calibration sample reached them", unreached))
            layers = {name: layer for name, layer in layers.items() if name in seen}
            constant = [name for name in layers if seen[name].low == seen[name].high]
            if constant:
                tell(_few("read one same value throughout the calibration data", constant))
        edits: list[Edit] = [place(model, name, reading, seen.get(name))[0] for name in layers]
        for reason in dict.fromkeys(floating.values()):
            names = [name for name in floating if floating[name] == reason]
            tell(f"What {_few('read stays float', names).removesuffix('.')}: {reason}.")
        if reading.mode == "static" and self.data is not None and self.data.held_out and model is self.model:
            self._count(self.data)
        return edits

    def _count(self, data: Calibration) -> None:
        """How much of held-out samples' activations was outside the ranges."""
        counts = saturated(self.model, data.held_out, self.task.forward)
        total = sum(count.seen for count in counts.values())
        outside = sum(count.outside for count in counts.values())
        worst = max(counts, key=lambda name: counts[name].share, default=None)
        if worst is not None and outside:
            self.tell(
                f"{outside} of {total} activations of held-out samples were outside the calibrated ranges and saturated; "
                f"most at {worst}: {100 * counts[worst].share:.3g} %."
            )

    def _correct(self, reference: nn.Module, done: Mapping[str, Rounded]) -> None:
        if not self.options.correct or self.data is None:
            if self.options.correct:
                self.tell(
                    "The task has no data to correct biases by: give Task(calibration=...). They stay as they are."
                )
            return
        if not self.data.held_out:
            self.tell("Nothing is held out, so that no correction could be judged, and none was made.")
            return
        found = correct(
            self.model,
            reference,
            self.data.fit,
            self.data.held_out,
            self.task.forward,
            self.options.correct,
            frozen=list(done),
            seed=self.stage.seed,
        )
        for one in found:
            self.tell(one.words)


def _few(what: str, names: Sequence[str]) -> str:
    shown = ", ".join(name or "the model" for name in names[:5]) + (" ..." if len(names) > 5 else "")
    return f"{len(names)} layer{'s' * (len(names) > 1)} {what}: {shown}."
