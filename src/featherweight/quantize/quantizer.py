# SPDX-License-Identifier: Apache-2.0
"""Quantization-aware training at work on a model: weights rounded while it runs, full-precision while they are updated.

An optimizer step begins by working LSQ's gradients out of those that came in, and by putting full-precision values in
the place of the rounded ones; `step()` rounds again. Between the two the model is the full-precision one, and that is
where another hook (a pruner) or an average of weights (EMA) should see it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import nn

from featherweight.edits import FakeQuantize, apply
from featherweight.errors import OptionError
from featherweight.grids import GridSpec
from featherweight.layers import Selected, Weight, from_matrix, names_of, refuse_nothing, to_matrix, unwrap
from featherweight.plan import Edit, FakeQuant, Plan
from featherweight.quantize.chosen import Chosen, reading_layers
from featherweight.quantize.learned import LearnedInput, LearnedWeight
from featherweight.quantize.prepare import fold_norms, folds_of
from featherweight.quantize.rounding import Rounding
from featherweight.quantize.selecting import choose_weights
from featherweight.task import describe

if TYPE_CHECKING:
    from featherweight.quantize.qat import QAT

__all__ = ["Quantizer"]

_VERSION = 1
_BETWEEN = (
    "additions, concatenations, pooling, recurrent states and outputs stay float here; export places the grids of such "
    "edges on the graph, from ranges recorded there"
)
_NORMS = (nn.modules.batchnorm._BatchNorm,)


class Quantizer:
    """What `QAT.attach` gives. Call `step()` after each optimizer step, and `finalize()` at the end.

    `selection` lists every weight of the model: quantized or kept, and why. `events` are what a report should say.
    """

    selection: tuple[Selected, ...]

    def __init__(
        self,
        options: QAT,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        example_inputs: tuple[Any, ...] | None,
    ) -> None:
        self.options = options
        self._optimizer = _innermost(optimizer)
        if options.learn and isinstance(self._optimizer, torch.optim.LBFGS):
            raise OptionError(
                "QAT: LBFGS takes no second group of parameters for the steps; give learn=False, or another optimizer."
            )
        self._group = getattr(model, "process_group", None)  # DistributedDataParallel's own, if it was given one
        parallel, model = isinstance(model, nn.parallel.DistributedDataParallel), unwrap(model)
        if parallel and options.folds == "first" and any(isinstance(module, _NORMS) for module in model.modules()):
            raise OptionError(
                "QAT: folding BatchNorm changes which parameters there are, and DistributedDataParallel knows those that it was "
                "made with. Attach before wrapping the model in it, or give fold='last'."
            )
        chosen, self.selection = choose_weights(model, options, example_inputs)
        refuse_nothing(self.selection, "quantize")
        self.events: list[dict[str, Any]] = []
        # Looking for norms comes before any change; from there on nothing raises, so that what cannot be attached
        # leaves the model as it was.
        there = {id(parameter) for parameter in model.parameters()}
        self._model, self._example_inputs = model, example_inputs
        self._chosen = Chosen((), {w.name: Rounding(GridSpec(bits, symmetric=True)) for w, bits in chosen})
        self._edits = self._fold("first")
        self._turn()
        grids = self._place(model, [weight for weight, _ in chosen])
        self._weights = [LearnedWeight(w, bits, options.per, options.start) for w, bits in chosen]
        self._inputs = [
            LearnedInput(layer, grid, options.start, known, self._group) for layer, (grid, known) in grids.items()
        ]
        new = [p for p in model.parameters() if id(p) not in there and p.requires_grad]
        if new:  # the biases that folding made
            self._optimizer.add_param_group({**_like(self._optimizer), "params": new})
        self._step, self._open, self._finalized = 0, False, False
        self._norms = [m for m in model.modules() if isinstance(m, _NORMS)] if options.freeze_norms is not None else []
        self._hooks = [norm.register_forward_pre_hook(self._frozen()) for norm in self._norms]
        self._hooks.append(self._optimizer.register_step_pre_hook(self._before))
        self._learn()
        for weight in self._weights:
            weight.round()

    def _tell(self, text: str) -> None:
        self.events.append({"kind": "message", "text": text})

    def _fold(self, when: str) -> list[Edit]:
        """Folds norms into layers whose weights are quantized; grids that a runtime has are those of folded weights."""
        if self.options.folds != when or not any(isinstance(module, _NORMS) for module in self._model.modules()):
            return []
        if self._example_inputs is None:
            self._tell(
                "BatchNorm was not folded: which layer each follows is seen in a forward. Give attach(..., example_inputs)."
            )
            return []
        edits, notes = fold_norms(self._model, self._example_inputs, self._chosen)
        for note in notes:
            self._tell(note)
        return edits

    def _turn(self) -> None:
        """Makes the factors positive by which norms will be folded last, since a symmetric grid times -1 is not one."""
        if self.options.folds != "last" or self._example_inputs is None:
            return
        by_layer = {weight.layer: weight for weight, _ in self._chosen.weights(self._model)}
        for edit in folds_of(self._model, self._example_inputs)[0]:
            if edit.layer in by_layer:
                _turn_rows(by_layer[edit.layer], self._model.get_submodule(edit.norm))

    def _place(self, model: nn.Module, chosen: list[Weight]) -> dict[str, tuple[FakeQuantize, bool]]:
        """The grids on what layers read, by layer, and whether each was there before; new ones are edits."""
        o = self.options
        if o.activation_bits is None:
            self._tell(
                "Weights alone are quantized; all activations stay float (activation_bits=8 trains with them too)."
            )
            return {}
        layers, floating = reading_layers(model, chosen, "static")
        named = {name.rpartition(".")[0] for weight in chosen for name in names_of(weight)}
        grids = {
            layer: (grid, True)
            for layer, module in model.named_modules()
            if layer in named
            and isinstance(grid := module._modules.get("input_grid"), FakeQuantize)
            and not grid.dynamic
        }
        for layer, module in layers.items():
            edit = FakeQuant(layer, o.activation_bits, o.activation_symmetric)
            apply(model, edit)
            self._edits.append(edit)
            grids[layer] = cast(FakeQuantize, module.input_grid), False
        what = "1 layer's input is" if len(grids) == 1 else f"{len(grids)} layers' inputs are"
        self._tell(f"{what} on a grid while training; {_BETWEEN}.")
        for layer, reason in list(floating.items())[:5]:
            self._tell(f"{layer or 'The model'}: what it reads stays float: {reason}.")
        if len(floating) > 5:
            self._tell(f"... and what {len(floating) - 5} more layers read.")
        fused = [weight.layer for weight in chosen if weight.kind == "attention"]
        if fused:
            self._tell(f"Attention is opened by a stage before this one: Apply([Swap({fused[0]!r}, to='attention')]).")
        return grids

    def _learn(self) -> None:
        """Gives the optimizer what is learned, without weight decay, at its own rate times `step_lr`."""
        learned = [*(w.factor for w in self._weights), *itertools.chain(*(x.learned for x in self._inputs))]
        for parameter in learned:
            parameter.requires_grad_(self.options.learn)
        if self.options.learn:
            group = _like(self._optimizer)
            self._optimizer.add_param_group(
                {
                    "params": learned,
                    "lr": group["lr"] * self.options.step_lr,
                    **({"weight_decay": 0.0} if "weight_decay" in group else {}),
                }
            )

    def _frozen(self) -> Callable[[nn.Module, Any], None]:
        after = self.options.freeze_norms

        def freeze(norm: nn.Module, args: Any) -> None:
            if after is not None and self._step >= after:
                norm.training = False

        return freeze

    def step(self) -> dict[str, Any]:
        """To be called after each `optimizer.step()`, and after other hooks: the model is rounded from here on.

        Returns `bits`, the mean over the weights that are quantized.
        """
        self._refuse_finalized()
        self._close()
        self._step += 1
        sizes = [weight.parameter.numel() for weight in self._weights]
        return {"bits": sum(w.bits * n for w, n in zip(self._weights, sizes, strict=True)) / sum(sizes)}

    def finalize(self) -> Plan:
        """Lets go of the model, whose weights stay on their grids as plain numbers, and returns the plan: its edits."""
        if not self._finalized:
            self._close()
            for hook in self._hooks:
                hook.remove()
            for grid in self._inputs:
                grid.release()
            self._finalized = True
            self._edits += self._fold("last")
        return Plan(tuple(self._edits))

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs, as nested dicts of tensors, numbers and strings. Not the options."""
        return {
            "version": _VERSION,
            "step": self._step,
            "weights": {weight.name: weight.state_dict() for weight in self._weights},
            "inputs": {grid.layer: grid.state_dict() for grid in self._inputs},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave, to the last bit; the model and the optimizer are restored by you.

        Raises `OptionError` where the state is of other layers or shapes; nothing is changed then.
        """
        self._refuse_finalized()
        self._check_state(state)
        self._step, self._open = int(state["step"]), False
        for weight in self._weights:
            weight.load_state_dict(state["weights"][weight.name])
            weight.round()
        for grid in self._inputs:
            grid.load_state_dict(state["inputs"][grid.layer])

    def _check_state(self, state: Mapping[str, Any]) -> None:
        if state.get("version") != _VERSION:
            raise OptionError(
                f"The saved state of QAT has version {state.get('version')!r}; this one reads {_VERSION}."
            )
        for part, own in (("weights", [w.name for w in self._weights]), ("inputs", [x.layer for x in self._inputs])):
            if different := sorted(set(state[part]) ^ set(own)):
                raise OptionError(
                    f"The saved state of QAT is of other {part} (different: {', '.join(different[:5])}). Attach with the "
                    "options of the run that saved it."
                )
        for weight in self._weights:
            saved = state["weights"][weight.name]
            if saved["full"].shape != weight.full.shape or saved["start"].shape != weight.start.shape:
                raise OptionError(
                    f"The saved state of {weight.name} is {describe(saved['full'])} with {saved['start'].numel()} steps; "
                    f"the model's is {describe(weight.full)} with {weight.start.numel()}."
                )

    def _refuse_finalized(self) -> None:
        if self._finalized:
            raise OptionError(
                "This quantization has been finalized and acts on nothing any more; attach again to go on."
            )

    def _close(self) -> None:
        """From full precision to rounded, where an optimizer step was taken (a loss scaler may have skipped it)."""
        if not self._open:
            return
        for weight in self._weights:
            weight.take_over()
            weight.round()
        for grid in self._inputs:
            grid.write()
        self._open = False

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Before an optimizer step: gradients are final here, unscaled by a loss scaler and reduced over processes."""
        if self._open:
            raise OptionError(
                "QAT: optimizer.step() was called twice without step() of the hook in between, so that the model ran with "
                "weights that were not rounded. Call it after each optimizer.step()."
            )
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._give(differentiate=True)
            return None
        self._give(differentiate=False)

        def rounded() -> Any:
            self._close()
            loss = closure()
            self._give(differentiate=True)
            return loss

        return (args[0], rounded, *args[2:]) if len(args) > 1 else args, (
            kwargs if len(args) > 1 else {**kwargs, "closure": rounded}
        )

    def _give(self, differentiate: bool) -> None:
        for weight in self._weights:
            weight.give(differentiate)
        if differentiate:
            _share([p for grid in self._inputs for p in grid.learned], self._group)
        self._open = True


@torch.no_grad()
def _turn_rows(weight: Weight, norm: nn.Module) -> None:
    """Changes the sign of rows that a norm multiplies by less than 0, and the norm's with them: the same function."""
    gain = norm._parameters.get("weight")
    if gain is None or not bool((gain < 0).any()):
        return
    sign = torch.where(gain < 0, -1.0, 1.0).to(gain.dtype)
    rows = to_matrix(weight, weight.parameter) * sign[:, None]
    weight.parameter.copy_(from_matrix(weight, rows + 0.0))
    for tensor in (gain, norm._buffers.get("running_mean"), weight.module._parameters.get("bias")):
        if tensor is not None:
            tensor.mul_(sign)


def _like(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The options of the optimizer's first group, where its rates start from."""
    return {key: value for key, value in optimizer.param_groups[0].items() if key not in ("params", "initial_lr")}


def _share(parameters: list[nn.Parameter], group: Any) -> None:
    """The mean of gradients over the ranks of a distributed run: what the model's wrapper does not know of."""
    if not (dist.is_available() and dist.is_initialized() and (world := dist.get_world_size(group)) > 1):
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad, group=group)
        parameter.grad.div_(world)


def _innermost(optimizer: Any) -> torch.optim.Optimizer:
    """torch's own optimizer inside wrappers that keep it as `.optimizer`, as accelerate's and Lightning's do."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise OptionError(
            f"QAT trains full-precision weights behind rounded ones, in the optimizer's own steps: attach(model, optimizer); "
            f"got {describe(optimizer)}."
        )
    return optimizer
