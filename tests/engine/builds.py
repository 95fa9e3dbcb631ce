# SPDX-License-Identifier: Apache-2.0
"""Builds of the engine for its checks, each in a folder of its own below engine/build that later builds take up again.

python -m tests.engine.builds sanitize           # tests in C++ and Python under the address, undefined and thread sanitizers
python -m tests.engine.builds fuzz [SECONDS]     # damaged and hostile files: rounds from Python, then libFuzzer (Clang)
python -m tests.engine.builds aarch64            # another processor: compiled, and its tests run under user-mode emulation
"""

import contextlib
import fcntl
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx

from tests.engine import hostile
from tests.engine.nodes import onnxruntime

ROOT = Path(__file__).parents[2]
ENGINE = ROOT / "engine"
QUICKLY = ["-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O1"]  # a build takes a third of the time
TESTS = ("test_pool", "test_kernels", "test_int8_layout")
HOSTILE = [sys.executable, "-m", "tests.engine.hostile"]
MEMORY = 3 << 30  # of address space for a process that reads hostile files
SANITIZERS = {"address": "address,undefined", "thread": "thread"}


def call(*command: str | Path, **environment: str) -> str:
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=os.environ | environment)
    assert ran.returncode == 0, f"{' '.join(map(str, command))}: {ran.returncode}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout


def tool(*command: str | Path) -> str:
    """The same of a compiler and the like, which no sanitizer is to watch where this process is watched."""
    return call(*command, LD_PRELOAD="")


@contextlib.contextmanager
def locked(name: str) -> Iterator[Path]:
    """The folder of a build. Processes that want the same one wait for each other."""
    folder = ENGINE / "build" / name
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def build(name: str, *options: str, targets: tuple[str, ...] = (), install: Path | None = None) -> Path:
    """The folder of a build with these options."""
    with locked(name) as folder:
        new = not (folder / "CMakeCache.txt").exists()
        generator = ["-G", "Ninja"] if new and shutil.which("ninja") else []
        prefix = [f"-DCMAKE_INSTALL_PREFIX={install}"] if install else []
        tool("cmake", "-S", ENGINE, "-B", folder, *generator, *options, *prefix)
        wanted = ["--target", *targets] if targets else []
        tool("cmake", "--build", folder, "--parallel", str(len(os.sched_getaffinity(0))), *wanted)
        if install:
            tool("cmake", "--install", folder)
    return folder


def sanitized(kind: str, *options: str, targets: tuple[str, ...] = (), install: Path | None = None) -> Path:
    """A build under "address" (with "undefined") or "thread"."""
    checks = [f"-DFEATHERWEIGHT_SANITIZE={SANITIZERS[kind]}", "-DFEATHERWEIGHT_TESTS=ON", "-DFEATHERWEIGHT_SHARED=ON"]
    return build(kind, *QUICKLY, *checks, *options, targets=targets, install=install)


def preloaded(kind: str) -> str:
    """What a process that was not compiled with the sanitizer loads first: it, and the C++ whose exceptions it looks up."""
    libraries = [{"address": "libasan.so", "thread": "libtsan.so"}[kind], "libstdc++.so"]
    return " ".join(call(os.environ.get("CXX", "c++"), f"-print-file-name={name}").strip() for name in libraries)


def sanitize() -> None:
    for kind in SANITIZERS:
        print(f"{kind}: building", flush=True)
        targets = (*TESTS, "test_files", "_core", "featherweight_engine")
        python = ["-DFEATHERWEIGHT_PYTHON=ON", f"-DPython_EXECUTABLE={sys.executable}"]
        folder = sanitized(kind, *python, targets=targets)
        for test in TESTS:
            print(f"{kind}: {test}", flush=True)
            call(folder / test, TSAN_OPTIONS="halt_on_error=1")
        if kind == "address":
            damaged(folder)
        package = folder / "python" / "featherweight_engine"
        package.mkdir(parents=True, exist_ok=True)
        for part in [*folder.glob("_core*.so"), *(ENGINE / "python" / "featherweight_engine").glob("*.py")]:
            shutil.copy2(part, package)
        environment = os.environ | {
            "LD_PRELOAD": preloaded(kind),
            "PYTHONPATH": os.pathsep.join([str(package.parent), str(ROOT / "src")]),
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",  # Python keeps what it has until its end
            # How ONNX Runtime's threads use their mutexes is seen in part only; how ours do, the tests in C++ show.
            "TSAN_OPTIONS": f"halt_on_error=1:exitcode=66:report_mutex_bugs=0:suppressions={ENGINE / 'tests' / 'thread.supp'}",
            "FEATHERWEIGHT_SANITIZED": kind,
        }
        # Addresses at random leave too little of the address space together for ThreadSanitizer on newer kernels.
        steady = ["setarch", "-R"] if kind == "thread" and shutil.which("setarch") else []
        print(f"{kind}: tests/engine", flush=True)
        tests = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "tests/engine"]
        subprocess.run([*steady, *tests], cwd=ROOT, env=environment, check=True)


def damaged(folder: Path) -> None:
    """Damaged and hostile files through the engine of a build, in C++: Python's own memory is no part of it."""
    with tempfile.TemporaryDirectory() as files:
        hostile.write(Path(files), itertools.islice(hostile.hostile(2, 500), 500))
        print(call(folder / "test_files", files, ASAN_OPTIONS="allocator_may_return_null=1"), end="", flush=True)


def fuzz(seconds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        last, seed = Path(folder, "last.onnx"), time.time_ns() % 1_000_000
        print(f"hostile files from seed {seed}", flush=True)
        subprocess.run([*HOSTILE, "-", str(seed), "50000", str(last), str(MEMORY)], cwd=ROOT, check=True)
    if shutil.which("clang++") is None:
        raise SystemExit("the fuzzer needs clang++ (libFuzzer)")
    checks = ["-DFEATHERWEIGHT_FUZZ=ON", "-DFEATHERWEIGHT_SANITIZE=address,undefined", "-DFEATHERWEIGHT_PYTHON=OFF"]
    built = build("fuzz", *QUICKLY, "-DCMAKE_CXX_COMPILER=clang++", *checks, targets=("fuzz_model",))
    corpus, found = built / "corpus", built / "found"
    found.mkdir(exist_ok=True)
    subprocess.run([*HOSTILE, str(corpus)], cwd=ROOT, check=True)
    limits = ["-timeout=60", "-rss_limit_mb=4096", "-malloc_limit_mb=4096", f"-max_total_time={seconds}"]
    subprocess.run([built / "fuzz_model", *limits, f"-artifact_prefix={found}/", str(corpus)], check=True)


def aarch64() -> None:
    cross, emulator = "aarch64-linux-gnu", shutil.which("qemu-aarch64")
    if shutil.which(f"{cross}-g++") is None or emulator is None:
        raise SystemExit(f"this needs {cross}-g++ and qemu-aarch64 (Debian: g++-{cross}, qemu-user)")
    system = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={cross}-g++"]
    options = [*system, "-DFEATHERWEIGHT_PYTHON=OFF", "-DFEATHERWEIGHT_TESTS=ON", "-DCMAKE_INSTALL_LIBDIR=lib"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        print("building", flush=True)
        built = build("aarch64", *options, install=folder)
        emulated = [emulator, "-L", f"/usr/{cross}"]
        for test in TESTS:
            print(test, flush=True)
            call(*emulated, built / test)
        print("the C example", flush=True)
        flags = [
            f"-I{folder / 'include'}",
            f"-L{folder / 'lib'}",
            "-lfeatherweight_engine",
            f"-Wl,-rpath,{folder / 'lib'}",
        ]
        call(f"{cross}-gcc", "-std=c11", ENGINE / "examples" / "run.c", *flags, "-o", folder / "run")
        for number, (data, expected) in enumerate(sums()):
            (folder / "model.onnx").write_bytes(data)
            printed = call(*emulated, folder / "run", folder / "model.onnx", "2")
            found = [float(line.split()[-1]) for line in printed.splitlines()]
            assert np.allclose(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True), (
                f"model {number}: {found}, not {expected}"
            )
        print("recording the cases of tests/engine", flush=True)
        record = folder / "cases"
        record.mkdir()
        tests = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "tests/engine"]
        subprocess.run(tests, cwd=ROOT, env=os.environ | {"FEATHERWEIGHT_RECORD": str(record)}, check=True)
        print("replaying them", flush=True)
        subprocess.run([*emulated, built / "test_replay", record], check=True)


def sums() -> Iterator[tuple[bytes, list[float]]]:
    """Small models, and for each output the sum that the C example prints, from ONNX Runtime."""
    for data in hostile.models():
        model = onnx.shape_inference.infer_shapes(onnx.load_from_string(data))
        types = {value.name: value for value in [*model.graph.output, *model.graph.value_info]}
        for value in model.graph.output:
            value.CopyFrom(types[value.name])
            if value.type.tensor_type.elem_type == onnx.TensorProto.UNDEFINED:  # of a function, which is not inferred
                value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
        inputs = {
            value.name: [d.dim_value or 1 for d in value.type.tensor_type.shape.dim] for value in model.graph.input
        }
        names = [value.name for value in model.graph.output]
        ramps = {
            name: ((np.arange(np.prod(s)) % 17 - 8) / 8).astype(np.float32).reshape(s) for name, s in inputs.items()
        }
        answers = [each for _, each in sorted(onnxruntime(model, ramps).items(), key=lambda item: names.index(item[0]))]
        yield data, [float(a.sum(dtype=np.float64)) if a.dtype == np.float32 else 0.0 for a in answers]


if __name__ == "__main__":
    if sys.argv[1] == "fuzz":
        fuzz(int(sys.argv[2]) if len(sys.argv) > 2 else 600)
    else:
        {"sanitize": sanitize, "aarch64": aarch64}[sys.argv[1]]()
