# SPDX-License-Identifier: Apache-2.0
"""Out of PyTorch: ONNX files that are checked against the model, and runtimes that are called as the model is."""

from featherweight.deploy.export import Export, export_onnx
from featherweight.deploy.parity import Parity, check_parity, parity, sample_inputs
from featherweight.deploy.sessions import RUNTIMES, Session, available_runtimes, session, torch_session

__all__ = [
    "RUNTIMES",
    "Export",
    "Parity",
    "Session",
    "available_runtimes",
    "check_parity",
    "export_onnx",
    "parity",
    "sample_inputs",
    "session",
    "torch_session",
]
