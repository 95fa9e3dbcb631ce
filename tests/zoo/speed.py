# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.zoo.speed`: how long combing takes on networks of full size, beyond torch.export, and with depth.

Seconds of one core, which other work on the machine does not touch. What trace spends within torch.export is timed there
and taken off; of two rounds the lesser counts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from featherweight.graph import trace
from tests.zoo.run import RESULTS

ROUNDS = 2


def _decoder(layers: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config), (torch.randint(0, 1000, (2, 16)),)


def _vision(family: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    import transformers

    config = getattr(transformers, f"{family}Config")()  # the defaults are ResNet-50 and ViT-B/16
    return getattr(transformers, f"{family}ForImageClassification")(config), (torch.randn(2, 3, 224, 224),)


CASES: dict[str, tuple[Callable[[], tuple[nn.Module, tuple[Tensor, ...]]], float | None]] = {
    "ResNet-50, 224 pixels": (lambda: _vision("ResNet"), 5.0),
    "ViT-B/16, 224 pixels": (lambda: _vision("ViT"), 5.0),
    **{
        f"Llama-like, {layers} layers": (lambda n=layers: _decoder(n), 20.0 if layers == 24 else None)
        for layers in (6, 12, 24, 48)
    },
}


def measure(name: str) -> dict[str, Any]:
    make, goal = CASES[name]
    model, inputs = make()
    model.eval()
    export, exports, beyond = torch.export.export, [], []

    def timed(*args: Any, **options: Any) -> Any:
        start = time.process_time()
        program = export(*args, **options)
        exports.append(time.process_time() - start)
        return program

    for _ in range(ROUNDS):
        with mock.patch.object(torch.export, "export", timed):
            start = time.process_time()
            found = trace(model, inputs)
            beyond.append(time.process_time() - start - exports[-1])
    return {
        "name": name,
        "operations": len(found.ops),
        "groups": len(found.groups),
        "export_seconds": round(min(exports), 2),
        "beyond_seconds": round(min(beyond), 2),
        "goal": goal,
    }


def main() -> None:
    torch.set_num_threads(1)
    rows = [measure(name) for name in CASES]
    path = RESULTS / "speed" / "speed.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(path.read_text())


if __name__ == "__main__":
    main()
