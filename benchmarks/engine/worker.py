# SPDX-License-Identifier: Apache-2.0
"""One runtime with one model, in a process of its own: told on standard input how often to run it, it answers the milliseconds.

It imports nothing of this project but for PyTorch's sake, so that an interpreter with other packages can run it.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Arrays = dict[str, "np.ndarray[Any, Any]"]
Run = Callable[[Arrays], "list[np.ndarray[Any, Any]]"]


def engine(model: str, threads: int) -> Run:
    import featherweight as fw

    session = fw.engine.load(model, threads=threads)
    return lambda arrays: list(session.run(arrays).values())


def onnxruntime(model: str, threads: int) -> Run:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda arrays: list(session.run(None, arrays))


def openvino(model: str, threads: int, precision: str = "f32") -> Run:
    import openvino as ov

    core = ov.Core()
    # Left to itself it computes in bfloat16 where the processor can, and then answers to three digits.
    hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    compiled = core.compile_model(core.read_model(model), "CPU", hints)
    request = compiled.create_infer_request()

    def run(arrays: Arrays) -> "list[np.ndarray[Any, Any]]":
        request.infer(arrays, share_inputs=True)
        return [request.get_output_tensor(i).data.copy() for i in range(len(compiled.outputs))]

    return run


def openvino_bf16(model: str, threads: int) -> Run:
    return openvino(model, threads, "bf16")


def deepsparse(model: str, threads: int) -> Run:
    os.environ["NM_DISABLE_ANALYTICS"] = os.environ["DO_NOT_TRACK"] = "True"
    from deepsparse import compile_model

    compiled: Any = None

    def run(arrays: Arrays) -> "list[np.ndarray[Any, Any]]":
        nonlocal compiled
        values = list(arrays.values())
        if compiled is None:
            compiled = compile_model(model, batch_size=len(values[0]), num_cores=threads)
        return list(compiled.run(values))

    return run


def torch(model: str, threads: int, compiled: bool = False) -> Run:
    import torch as pytorch

    from benchmarks.engine.networks import pruned

    pytorch.set_num_threads(threads)
    name, sparsity = model.split("@")
    module = pruned(name, float(sparsity))
    call: Any = pytorch.compile(module) if compiled else module

    def run(arrays: Arrays) -> "list[np.ndarray[Any, Any]]":
        with pytorch.inference_mode():
            made = call(*(pytorch.from_numpy(array) for array in arrays.values()))
        return [each.numpy() for each in (made if isinstance(made, tuple) else (made,))]

    return run


def torch_compile(model: str, threads: int) -> Run:
    return torch(model, threads, compiled=True)


RUNTIMES = {
    each.__name__: each for each in (engine, onnxruntime, openvino, openvino_bf16, deepsparse, torch, torch_compile)
}
PACKAGES = {"engine": "featherweight.engine"}  # where a runtime's package has another name


def peak_bytes() -> int:
    """The most memory that this process has held at once."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def main() -> None:
    name, model, threads, inputs = sys.argv[1:]
    # Runtimes print to the standard output as they like; answers go out by a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    arrays = {key: np.ascontiguousarray(value) for key, value in np.load(inputs).items()}
    importlib.import_module(PACKAGES.get(name, name.split("_")[0]))  # what a package costs is not the model's
    before = peak_bytes()
    begin = time.perf_counter()
    run = RUNTIMES[name](model, int(threads))
    outputs = run(arrays)
    loaded = time.perf_counter() - begin
    np.savez(inputs.replace("inputs.npz", f"outputs-{os.getpid()}.npz"), *outputs)
    facts = {"load_s": loaded, "peak_bytes": peak_bytes(), "bytes_before": before, "pid": os.getpid()}
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            begin = time.perf_counter()
            run(arrays)
            times.append((time.perf_counter() - begin) * 1e3)
        print(json.dumps(times), file=answers, flush=True)


if __name__ == "__main__":
    main()
