# SPDX-License-Identifier: Apache-2.0
"""`PYTHON nncodec_side.py TENSORS.npz FOLDER QP...`: Fraunhofer's nncodec on some tensors, run by the interpreter that has it.

Writes FOLDER/QP.npz, what nncodec gives back at each quantization parameter, and prints {QP: bytes} as its last line. It
pins its own versions of torch and others, so that it lives in an environment of its own and imports nothing of ours.
"""

import contextlib
import json
import sys
from pathlib import Path

import numpy as np
from nncodec import nn


def main() -> None:
    tensors = dict(np.load(sys.argv[1]))
    folder = Path(sys.argv[2])
    sizes = {}
    for text in sys.argv[3:]:
        with contextlib.redirect_stdout(sys.stderr):
            options = {"qp": int(text), "results": str(folder), "model": "network", "verbose": False}
            coded = nn.encode({name: value.copy() for name, value in tensors.items()}, options)
            back = nn.decode(bytearray(coded))
        sizes[text] = len(coded)
        np.savez(folder / f"{text}.npz", **{name: np.asarray(back[name]) for name in tensors})
    print(json.dumps(sizes))


if __name__ == "__main__":
    main()
