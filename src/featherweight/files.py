# SPDX-License-Identifier: Apache-2.0
"""Files that are either the old ones or the new ones, whenever the process dies. Imports no torch."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from featherweight.errors import ArtefactError

__all__ = ["write_atomically"]


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary path)` in the same folder, flushes to disk and renames; leaves nothing half-written.

    Raises `ArtefactError` where the folder cannot be written or the disk is full; an older file stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"{path} could not be written: {error}. What stood there before is untouched.") from error
    finally:
        temporary.unlink(missing_ok=True)
