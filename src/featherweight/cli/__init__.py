# SPDX-License-Identifier: Apache-2.0
"""The command line: seven verbs, each a thin face of a library function, and one way of saying what went wrong.

Nothing here imports torch until a command needs it, so that `featherweight --help` answers at once.
"""

from featherweight.cli.app import app, main

__all__ = ["app", "main"]
