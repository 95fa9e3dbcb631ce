# SPDX-License-Identifier: Apache-2.0
"""Channel pruning at work on one model: scores are gathered while it trains, couplings masked when due, cut at the end.

Until then the model keeps its shapes: what is gone is zero (`layers.Zeros`), so that the optimizer, compiled graphs,
DistributedDataParallel and checkpoints are as ever. `finalize()` cuts what is zero out of the model and its optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from featherweight.edits import cut
from featherweight.errors import NumericalError, OptionError
from featherweight.graph import Group, Trace, trace
from featherweight.layers import Zeros, unwrap
from featherweight.plan import Plan
from featherweight.prune.channels.activation import InputNorms
from featherweight.prune.channels.curvature import curvature
from featherweight.prune.channels.decide import Decision, decide, prices_of
from featherweight.prune.channels.events import events_of
from featherweight.prune.channels.gates import PerSample, gate_gradient, gate_members, seen_by_hooks
from featherweight.prune.channels.gather import finished, scores_of
from featherweight.prune.channels.importance import OF_GATES, PER_SAMPLE
from featherweight.prune.channels.latency import on_device
from featherweight.prune.channels.masks import couplings_gone, masks_of, zero_buffers
from featherweight.prune.channels.selection import choose_groups, refuse_nothing
from featherweight.prune.channels.trial import that_can_be_cut
from featherweight.prune.pruner import innermost
from featherweight.prune.schedule import SCHEDULES, updates_at

if TYPE_CHECKING:
    from featherweight.prune.channels.gradual import GradualChannelPruning

__all__ = ["ChannelPruner"]

_VERSION = 1
_STATES_EVERY = 16
_PROBES = 4


class ChannelPruner:
    """What `GradualChannelPruning.attach` gives. Call `step()` after each optimizer step, and `finalize()` at the end.

    `trace` is the model's as it was when attached; `reasons` say of each group that stays whole why. After `finalize`,
    `events` are the facts for a report: a line for each group, messages, and what was not met.
    """

    events: tuple[dict[str, Any], ...] = ()

    def __init__(
        self,
        options: GradualChannelPruning,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        example_inputs: Any,
        known: Trace | None,
        follow: Sequence[Any],
    ) -> None:
        self.options = options
        self._optimizer = innermost(optimizer)
        self._model = unwrap(model)
        self._process_group = getattr(model, "process_group", None)  # DistributedDataParallel's own
        if example_inputs is None:
            raise OptionError(
                "Which channels go together is read from a forward pass: attach(model, optimizer, example_inputs=(x,))."
            )
        self._inputs = example_inputs
        if known is None:
            known = trace(self._model, on_device(example_inputs, self._model), grain=options.grain)  # type: ignore[arg-type]
        self.trace: Trace = known
        self._follow = ([] if self._optimizer is None else [self._optimizer]) + list(follow)
        self._parameters: dict[str, nn.Parameter] = dict(self._model.named_parameters(remove_duplicate=False))
        self._groups, self.reasons = choose_groups(self._model, self.trace, options, masked=True)
        self._groups = self._those_that_can_be_scored()
        inputs = on_device(example_inputs, self._model)
        self._groups, failures = that_can_be_cut(self._model, self.trace, self._groups, inputs, options.verify)
        self.reasons |= failures
        refuse_nothing(self._groups, self.trace, self.reasons)
        self._prices = prices_of(self._model, self.trace, self._groups, options, inputs)
        # From here on nothing raises, so that what cannot be attached leaves no hook behind.
        self._gone = {group.name: np.zeros(group.size, dtype=bool) for group in self._groups}
        self._zeros = Zeros(self._optimizer)
        self._step, self._pending, self._plan = 0, False, Plan()
        self._finalized = False
        self._decision: Decision | None = None
        self._gathered: dict[str, Tensor] = {}
        self._hook: Any = None
        self._watch: PerSample | InputNorms | None = None
        self._listen()

    @property
    def kept(self) -> dict[str, int]:
        """How many couplings of each group are kept now."""
        sizes = dict(self.trace.sizes)
        return sizes | {name: int((~gone).sum()) for name, gone in self._gone.items()}

    def step(self) -> dict[str, Any]:
        """To be called after each `optimizer.step()`. Masks the lowest couplings where the schedule says so.

        Returns `channels`, the share of couplings kept in the groups that may be cut, and `updated`. Raises
        `NumericalError` at an update where scores are not finite or no gradient came.
        """
        self._refuse_finalized()
        o = self.options
        self._zeros.enforce(states=self._step % _STATES_EVERY == 0)
        due = self._pending or updates_at(self._step, o.begin, o.end, o.every, o.schedule)
        updated = due and self._update()
        self._step += 1
        left = sum(int((~gone).sum()) for gone in self._gone.values())
        return {"channels": left / sum(group.size for group in self._groups), "updated": updated}

    def finalize(self) -> Plan:
        """Cuts what is masked out of the model, the optimizer and all that follows, and lets go of them.

        Where the cut fails or does not hold, `edits.cut` raises and the model stays masked and whole.
        """
        if self._finalized:
            return self._plan
        self._zeros.enforce()
        self._zeros.release()
        self._be_deaf()
        couplings = couplings_gone(self._groups, self._gone)
        if couplings:
            self._model.zero_grad(set_to_none=True)
            done = cut(
                self._model,
                couplings,
                trace=self.trace,
                inputs=on_device(self._inputs, self._model),
                follow=self._follow,
                verify=self.options.verify,
            )
            self._plan = done.plan
        self._finalized = True
        self.events = tuple(events_of(self.trace, self._gone, self.reasons, self._decision))
        return self._plan

    def state_dict(self) -> dict[str, Any]:
        """All that resuming needs, as nested dicts of tensors, numbers and strings. Not the options."""
        return {
            "version": _VERSION,
            "step": self._step,
            "pending": self._pending,
            "gone": {name: torch.from_numpy(gone.copy()) for name, gone in self._gone.items()},
            "gathered": {name: total.clone() for name, total in self._gathered.items()},
            "read": self._watch.state_dict() if isinstance(self._watch, InputNorms) else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave; the model and the optimizer are restored by you.

        Raises `OptionError` where the state is of other groups; nothing is changed then.
        """
        self._refuse_finalized()
        sizes = {name: len(gone) for name, gone in state.get("gone", {}).items()}
        if state.get("version") != _VERSION or sizes != {group.name: group.size for group in self._groups}:
            raise OptionError(
                "The saved state of channel pruning is of another version or other groups. Attach to the same model with "
                "the options of the run that saved it."
            )
        self._step, self._pending = int(state["step"]), bool(state["pending"])
        self._gone = {name: gone.cpu().numpy().astype(bool) for name, gone in state["gone"].items()}
        self._gathered = {name: total.cpu().clone() for name, total in state["gathered"].items()}
        if isinstance(self._watch, InputNorms):
            self._watch.load_state_dict(state["read"])
        self._hold()

    def _refuse_finalized(self) -> None:
        if self._finalized:
            raise OptionError("This pruner has been finalized and has cut the model; attach again to go on.")

    def _those_that_can_be_scored(self) -> list[Group]:
        """The groups that the importance can rank while training; the others' reasons are noted."""
        importance, where = self.options.importance, self.options.gates
        if importance in OF_GATES and self._optimizer is None:
            raise OptionError(
                f"importance={importance!r} reads gradients as the optimizer is about to use them: attach(model, optimizer)."
            )
        if importance == "curvature" and self.options.closure is None:
            raise OptionError(
                "importance='curvature' needs backward passes of its own: give closure, a function of the model that gives "
                "the loss of a batch, or use importance='cpd'."
            )
        chosen = []
        for group in self._groups:
            reason = None
            names = [member.tensor for member in gate_members(group, where)]
            if importance in (*OF_GATES, "curvature"):
                still = [name for name in names if not self._parameters[name].requires_grad]
                reason = (
                    f"{still[0]} is not trained, and importance={importance!r} needs its gradient" if still else None
                )
            if reason is None and importance in PER_SAMPLE:
                unseen = seen_by_hooks(self._model, group, where)
                reason = f"{unseen}, and importance={importance!r} needs it; 'cpd' does not" if unseen else None
            if reason is None:
                chosen.append(group)
            else:
                self.reasons[group.name] = reason
        return chosen

    def _listen(self) -> None:
        importance = self.options.importance
        if importance in PER_SAMPLE:
            self._watch = PerSample(self._model, self._groups, self.options.gates)
        elif importance == "activation":
            self._watch = InputNorms(self._model, self._groups)
        if importance in OF_GATES and self._optimizer is not None:
            self._hook = self._optimizer.register_step_pre_hook(self._gather)

    def _be_deaf(self) -> None:
        if self._watch is not None:
            self._watch.close()
        if self._hook is not None:
            self._hook.remove()
        self._watch = self._hook = None

    @torch.no_grad()
    def _gather(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Before an optimizer step: gradients are final here, unscaled by a loss scaler and reduced over processes."""
        o = self.options
        fresh = self._watch.take() if isinstance(self._watch, PerSample) else None
        if not self._pending and not o.begin - o.every < self._step <= o.end:
            return
        scale, overflow = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        if overflow is not None and bool(overflow):
            return
        gradients = {name: parameter.grad for name, parameter in self._parameters.items()}
        for group in self._groups:
            own = None
            if fresh is not None:
                own = fresh.get(group.name)
            else:
                found = gate_gradient(group, self._parameters, gradients, o.gates)
                own = None if found is None else found[None]
            if own is None:
                continue
            score = OF_GATES[str(o.importance)](own if scale is None else own / scale).nan_to_num(0.0, 0.0, 0.0)
            before = self._gathered.get(group.name)  # on the device until an update: nothing waits for it
            self._gathered[group.name] = score if before is None else before.to(score.device) + score

    def _update(self) -> bool:
        """Chooses what goes and masks it; False where it has to wait for a gradient."""
        o = self.options
        scores = self._scores()
        if scores is None:
            # A loss scaler skips steps until its scale fits; the update waits for the first gradient.
            self._pending = True
            return False
        progress = 1.0 if self._step >= o.end else 1 - SCHEDULES[o.schedule]((self._step - o.begin) / (o.end - o.begin))
        timed = "latency" in o.until
        if timed:
            self._be_deaf()  # copies are timed, and are not to be watched
        inputs = on_device(self._inputs, self._model)
        self._decision = decide(
            self._model, self.trace, self._groups, scores, self._gone, o, self._prices, inputs, progress
        )
        if timed:
            self._listen()
        self._gone = self._agreed(self._decision.gone)
        self._hold()
        self._gathered, self._pending = {}, False
        if isinstance(self._watch, InputNorms):
            self._watch.reset()
        return True

    def _scores(self) -> dict[str, Tensor] | None:
        o = self.options
        if o.importance in OF_GATES:
            if not self._gathered:
                return None
            unseen = [group.name for group in self._groups if group.name not in self._gathered]
            if unseen:
                raise NumericalError(
                    f"No gradient came to group {unseen[0]} since the last update, so that importance={o.importance!r} "
                    f"cannot rank it. Masks are as they were. keep=['{unseen[0]}'] leaves it whole."
                )
            return finished(self._gathered, o.scaling)
        if isinstance(self._watch, InputNorms):
            return finished(self._watch.scores(), o.scaling)
        if o.importance == "curvature":
            found = curvature(self._parameters, self._groups, self._closure, _PROBES, o.gates, o.seed + self._step)
            return finished(found, o.scaling)
        return scores_of(self._model, self._groups, self._gone, o, None, self._step)[0]

    def _closure(self) -> dict[str, Tensor | None]:
        names = sorted({m.tensor for group in self._groups for m in gate_members(group, self.options.gates)})
        closure = self.options.closure
        if closure is None:
            return {}
        loss = closure(self._model)
        found = torch.autograd.grad(loss, [self._parameters[name] for name in names], allow_unused=True)
        return dict(zip(names, found, strict=True))

    def _agreed(self, gone: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The first rank's choice on every rank of a distributed run, so that they cannot differ by a rounding."""
        group = self._process_group
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1):
            return gone
        device = next(self._model.parameters()).device
        joined = torch.from_numpy(np.concatenate(list(gone.values()))).to(device, torch.uint8)
        dist.broadcast(joined, group=group, group_src=0)
        parts = np.split(joined.cpu().numpy().astype(bool), np.cumsum([len(flags) for flags in gone.values()])[:-1])
        return dict(zip(gone, parts, strict=True))

    def _hold(self) -> None:
        for parameter, mask in masks_of(self._parameters, self._groups, self._gone).items():
            before = self._zeros.pruned(parameter)
            if before is None or not torch.equal(before, mask):
                self._zeros.hold(parameter, mask)
        zero_buffers(self._model, self._groups, self._gone)
