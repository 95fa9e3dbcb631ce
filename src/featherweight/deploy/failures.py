# SPDX-License-Identifier: Apache-2.0
"""Why an export failed, in the one line that matters, at the user's own line of code, and what to do about it.

torch's exporter answers with pages: three nested exceptions, bug-report advice and its own stack. The cause is at the
bottom of the chain, and the user's line in the traceback or, for data-dependent branches, in the text.
"""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

__all__ = ["explain", "is_data_dependent", "lacks_an_op", "reason"]

_FIXED_AXIS = re.compile(r"tracing inferred a static shape of (\d+) for dimension inputs(.+?)\.shape\[(\d+)\]")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)\n\s*(?P<code>[^\n]*)')
_STANDARD_LIBRARY = sysconfig.get_path("stdlib")
_TOOLS = (
    str(Path(__file__).parents[1]),
    *(str(Path(torch.__file__).parents[1] / name) for name in ("torch", "onnx", "onnxscript", "onnx_ir")),
)


def is_data_dependent(error: BaseException) -> bool:
    """Whether the model's Python takes a decision on a tensor's values, which no graph without branches can hold."""
    return any(
        type(cause).__name__ == "GuardOnDataDependentSymNode" or "data-dependent" in str(cause)
        for cause in _chain(error)
    )


def lacks_an_op(error: BaseException) -> bool:
    """Whether torch's exporter has no ONNX form for one of the model's ops."""
    return any("No ONNX function found" in str(cause) for cause in _chain(error))


def reason(error: BaseException) -> str:
    """The essential line of the cause, without its exception's bug-report advice.

    >>> reason(RuntimeError("Found conflicts:\\n- axis 0 is 2.\\n\\nSee the log."))
    'RuntimeError: Found conflicts: axis 0 is 2'
    """
    cause = list(_chain(error))[-1]
    lines = [text.strip(" -") for text in _COLOURS.sub("", str(cause)).splitlines() if text.strip()] or [""]
    fixed = _FIXED_AXIS.search(str(cause))
    if fixed:
        return f"the model's own code sets axis {fixed[3]} of its input {fixed[2]} to {fixed[1]}"
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(cause).__name__}: {line.rstrip('.')}"


def explain(error: BaseException) -> str:
    """`reason`, where in the user's code, and what to type next.

    >>> explain(RuntimeError("no such op"))
    'RuntimeError: no such op. torch.export.export(model.eval(), example_inputs) gives the whole trace.'
    """
    where = _place(error)
    return f"{where + ': ' if where else ''}{reason(error)}. {_advice(error)}"


def _advice(error: BaseException) -> str:
    if is_data_dependent(error):
        return (
            "The branch depends on a tensor's values, which an exported graph cannot follow: write it as torch.where or "
            "torch.cond, or export the part of the model without it."
        )
    if lacks_an_op(error):
        return "The op has no ONNX form in torch's exporter: replace it by ops that have one, or leave it outside the model."
    return "torch.export.export(model.eval(), example_inputs) gives the whole trace."


def _place(error: BaseException) -> str:
    """`net.py:12 in forward, "if x.sum() > 0:"` of the innermost frame that is the user's."""
    frames = [
        (m["file"], int(m["line"]), m["function"], m["code"]) for c in _chain(error) for m in _FRAME.finditer(str(c))
    ]
    for cause in _chain(error):
        frames += [(f.filename, f.lineno or 0, f.name, f.line or "") for f in traceback.extract_tb(cause.__traceback__)]
    mine = [frame for frame in frames if _is_the_users(frame[0])]
    # The exporter's text has the forward alone; a traceback begins with the script that called for the export.
    for file, number, function, code in reversed([frame for frame in mine if frame[2] != "<module>"]):
        return f'{_short(file)}:{number} in {function}, "{code.strip()}"'
    return ""


def _is_the_users(file: str) -> bool:
    standard = file.startswith(_STANDARD_LIBRARY) and "site-packages" not in file
    return file.endswith(".py") and not standard and not file.startswith(_TOOLS)


def _short(file: str) -> str:
    try:
        return str(Path(file).relative_to(Path.cwd()))
    except ValueError:
        return file


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
