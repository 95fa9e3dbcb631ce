# SPDX-License-Identifier: Apache-2.0
"""Gradual pruning at work on one model: told of each optimizer step, it chooses masks when they are due and holds them.

It keeps no tensor on the model and changes none of its modules: masks are zeros (`layers.Zeros`). What it must remember
is in `state_dict`; everything else follows from the options and the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from featherweight.errors import NumericalError, OptionError
from featherweight.layers import Selected, Zeros, existing_zeros, refuse_nothing
from featherweight.plan import Plan
from featherweight.prune.importance import GRADIENT_BASED, add_gradient
from featherweight.prune.masks import (
    Masks,
    check_reach,
    choose_masks,
    held_shares,
    involved,
    plan_of,
    refuse_not_finite,
)
from featherweight.prune.schedule import sparsity_at, updates_at
from featherweight.prune.selection import choose_layers
from featherweight.task import describe

if TYPE_CHECKING:
    from featherweight.prune.gradual import GradualPruning

__all__ = ["Pruner", "innermost"]

_VERSION = 1
# Counted by step, so that a resumed run's optimizer has the same bits. Half the cost of a step lies in this.
_STATES_EVERY = 16


class Pruner:
    """What `GradualPruning.attach` gives. Call `step()` after each optimizer step, and `finalize()` at the end.

    `selection` lists every weight of the model: pruned or kept, and why.
    """

    selection: tuple[Selected, ...]

    def __init__(
        self,
        options: GradualPruning,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        example_inputs: tuple[Any, ...] | None,
    ) -> None:
        self.options = options
        self._optimizer = innermost(optimizer)
        gathers = options.importance in GRADIENT_BASED
        if gathers and self._optimizer is None:
            raise OptionError(
                f"importance={options.importance!r} reads gradients as the optimizer is about to use them: "
                "attach(model, optimizer)."
            )
        self._targets, self.selection = choose_layers(model, options, example_inputs, self._is_trained)
        refuse_nothing(self.selection)
        refuse_not_finite(self._targets, "at attach")
        self._zeros = Zeros(self._optimizer)
        self._group = getattr(model, "process_group", None)  # DistributedDataParallel's own, if it was given one
        self._weights = involved(self._targets)
        self._names = {weight.parameter: name for name, weight in self._weights.items()}
        self._names |= {t.bias: f"{t.weight.layer}.bias" for t in self._targets if t.bias is not None}
        held: Masks = {}
        if options.initial is None:
            held = {w.parameter: pruned for w, pruned in existing_zeros(model) if w.name in self._weights}
        check_reach(self._targets, options, held)
        self._initial = held_shares(self._targets, options, held)
        if options.initial is not None:
            self._initial = [options.initial] * len(self._targets)
        # From here on nothing raises, so that what cannot be attached leaves no hook behind.
        self._step, self._pending, self._finalized = 0, False, False
        self._hold(held)
        self._gathered: dict[str, Tensor] = {}
        self._seen: dict[str, int] = {}
        self._forget_gradients()
        self._sparsity = self._measure()
        self._hook = None
        if gathers and self._optimizer is not None:
            self._hook = self._optimizer.register_step_pre_hook(self._gather)

    def step(self) -> dict[str, Any]:
        """To be called after each `optimizer.step()`. Chooses masks anew where the schedule says so, and holds zeros.

        Returns `sparsity`, the share of zeros held in the pruned layers, and `updated`, whether masks were chosen.
        Raises `NumericalError` at an update where a weight is not finite, or had no gradient to rank it by.
        """
        self._refuse_finalized()
        o = self.options
        self._zeros.enforce(states=self._step % _STATES_EVERY == 0)
        due = self._pending or updates_at(self._step, o.begin, o.end, o.every, o.schedule)
        updated = due and self._update()
        self._step += 1
        return {"sparsity": self._sparsity, "updated": updated}

    def finalize(self) -> Plan:
        """Lets go of the model, whose zeros stay where they are, and returns the plan: codec hints, no edits."""
        if not self._finalized:
            self._zeros.enforce()
            self._zeros.release()
            if self._hook is not None:
                self._hook.remove()
            self._finalized = True
        return plan_of(self._targets, self.options.parsed)

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs, as nested dicts of tensors, numbers and strings. Not the options."""
        return {
            "version": _VERSION,
            "step": self._step,
            "pending": self._pending,
            "initial": {t.weight.name: share for t, share in zip(self._targets, self._initial, strict=True)},
            "masks": {self._names[parameter]: mask for parameter, mask in self._zeros},
            "gathered": {name: total.clone() for name, total in self._gathered.items()},
            "seen": dict(self._seen),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave, to the last bit; the model and the optimizer are restored by you.

        Raises `OptionError` where the state is of other layers or shapes; nothing is changed then.
        """
        self._refuse_finalized()
        self._check_state(state)
        names = {name: parameter for parameter, name in self._names.items()}
        self._step, self._pending = int(state["step"]), bool(state["pending"])
        self._initial = [float(state["initial"][target.weight.name]) for target in self._targets]
        self._zeros.release()
        self._hold({names[name]: mask.to(names[name].device) for name, mask in state["masks"].items()})
        for name, total in state["gathered"].items():
            self._gathered[name] = total.to(self._weights[name].parameter.device, copy=True)
        self._seen = dict(state["seen"])
        self._sparsity = self._measure()

    def _check_state(self, state: Mapping[str, Any]) -> None:
        if state.get("version") != _VERSION:
            raise OptionError(
                f"The pruner's saved state has version {state.get('version')!r}; this one reads {_VERSION}."
            )
        saved, own = set(state["initial"]), {target.weight.name for target in self._targets}
        if saved != own or set(state["gathered"]) != set(self._gathered):
            different = ", ".join(sorted(saved ^ own)[:5]) or "the importance"
            raise OptionError(
                f"The pruner's saved state is of other layers or options (different: {different}). Attach with the "
                "options of the run that saved it."
            )
        shapes = {name: parameter.shape for parameter, name in self._names.items()}
        for name, mask in state["masks"].items():
            if name not in shapes or mask.shape != shapes[name]:
                raise OptionError(
                    f"The pruner's saved mask of {name} is {describe(mask)}; the model has "
                    f"{list(shapes[name]) if name in shapes else 'no such parameter among those pruned'}."
                )

    def _refuse_finalized(self) -> None:
        if self._finalized:
            raise OptionError("This pruner has been finalized and holds nothing any more; attach again to go on.")

    def _is_trained(self, parameter: nn.Parameter) -> bool:
        groups = [] if self._optimizer is None else self._optimizer.param_groups
        return parameter.requires_grad and any(parameter is p for group in groups for p in group["params"])

    def _held(self) -> Masks:
        return dict(self._zeros)

    def _hold(self, masks: Masks) -> None:
        for parameter, mask in masks.items():
            if int(mask.count_nonzero()):
                self._zeros.hold(parameter, mask)

    def _measure(self) -> float:
        held = self._held()
        own = [target.weight.parameter for target in self._targets]
        zeros = sum(int(held[parameter].count_nonzero()) for parameter in own if parameter in held)
        return zeros / sum(parameter.numel() for parameter in own)

    def _update(self) -> bool:
        """Chooses masks and holds them; False where it has to wait for a gradient."""
        if self._seen and not any(self._seen.values()):
            # A loss scaler skips steps until its scale fits; the update waits for the first gradient.
            self._pending = True
            return False
        self._refuse_unseen()
        refuse_not_finite(self._targets, f"at step {self._step}")
        o = self.options
        goals = [
            sparsity_at(self._step, o.begin, o.end, initial, target.sparsity, o.schedule)
            for target, initial in zip(self._targets, self._initial, strict=True)
        ]
        masks = choose_masks(self._targets, o, goals, self._held(), self._gathered, self._step)
        _agree(masks, self._group)
        self._hold(masks)
        self._forget_gradients()
        self._pending = False
        self._sparsity = self._measure()
        return True

    def _refuse_unseen(self) -> None:
        unseen = [name for name, count in self._seen.items() if count == 0]
        if unseen:
            raise NumericalError(
                f"{', '.join(unseen[:5])} had no gradient up to step {self._step}, so that "
                f"importance={self.options.importance!r} cannot rank it. Does the loss depend on it? "
                f"keep={unseen[:5]} leaves it dense."
            )

    def _forget_gradients(self) -> None:
        if self.options.importance not in GRADIENT_BASED:
            return
        for name, weight in self._weights.items():
            dtype = torch.promote_types(weight.parameter.dtype, torch.float32)
            self._gathered[name] = torch.zeros_like(weight.parameter, dtype=dtype, requires_grad=False)
            self._seen[name] = 0

    @torch.no_grad()
    def _gather(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Before an optimizer step: gradients are final here, unscaled by a loss scaler and reduced over processes."""
        o = self.options
        if not self._pending and not o.begin - o.every < self._step <= o.end:
            return
        # A fused optimizer divides by the loss scale itself, and skips the step itself where gradients overflowed.
        scale, overflow = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        if overflow is not None and bool(overflow):
            return
        for name, weight in self._weights.items():
            parameter, gradient = weight.parameter, weight.parameter.grad
            if gradient is None:
                continue
            if self._gathered[name].device != parameter.device:
                self._gathered[name] = self._gathered[name].to(parameter.device)
            add_gradient(
                self._gathered[name], parameter, gradient if scale is None else gradient / scale, str(o.importance)
            )
            self._seen[name] += 1


def innermost(optimizer: Any) -> torch.optim.Optimizer | None:
    """torch's own optimizer inside wrappers that keep it as `.optimizer`, as accelerate's and Lightning's do."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise OptionError(
            f"attach(model, optimizer): the optimizer is {describe(optimizer)}, not a torch.optim.Optimizer."
        )
    return optimizer


def _agree(masks: Masks, group: Any) -> None:
    """Takes the first rank's masks on every rank of a distributed run, so that they cannot differ by a rounding."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1):
        return
    device = next(iter(masks)).device
    joined = torch.cat([mask.flatten().to(device, torch.uint8) for mask in masks.values()])
    dist.broadcast(joined, group=group, group_src=0)
    parts = torch.split(joined, [mask.numel() for mask in masks.values()])
    for (parameter, mask), part in zip(list(masks.items()), parts, strict=True):
        masks[parameter] = part.view(mask.shape).to(mask.device, torch.bool)
