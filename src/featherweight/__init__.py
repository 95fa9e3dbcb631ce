# SPDX-License-Identifier: Apache-2.0
"""featherweight makes PyTorch models smaller and faster, and proves it.

Names load on first use, so that `import featherweight` costs next to nothing beyond torch.
"""

from __future__ import annotations

__version__ = "0.1.0"
