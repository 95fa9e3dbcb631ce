# SPDX-License-Identifier: Apache-2.0
"""Tensor codecs and the file that holds them: each tensor in its smallest exact form, and back to the last bit.

What pruning leaves is zeros, and zeros cost as much as any number until something leaves them out. `save_file` does,
and whether a tensor is sparse is read from its values alone. docs/file-format.md is the format, for other readers.
"""

from featherweight.pack.codecs import Coded, code
from featherweight.pack.container import load_file, read_header, save_file

__all__ = ["Coded", "code", "load_file", "read_header", "save_file"]
