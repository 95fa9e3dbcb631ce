# SPDX-License-Identifier: Apache-2.0
"""Out of PyTorch: ONNX files that are checked against the model, and runtimes that are called as the model is."""

from featherweight.deploy.export import Export, export_onnx
from featherweight.deploy.forms import INTEGER_RUNTIMES, Form, form_in, int8_instructions, is_quantized
from featherweight.deploy.integer import Agreement, IntegerReference, NodeAgreement, agreement, agreement_by_node
from featherweight.deploy.parity import Parity, check_parity, parity, sample_inputs
from featherweight.deploy.qdq import Integers, without_integers
from featherweight.deploy.ranges import calibration_inputs, other_sizes
from featherweight.deploy.sessions import RUNTIMES, EngineSession, Session, available_runtimes, session, torch_session

__all__ = [
    "INTEGER_RUNTIMES",
    "RUNTIMES",
    "Agreement",
    "EngineSession",
    "Export",
    "Form",
    "IntegerReference",
    "Integers",
    "NodeAgreement",
    "Parity",
    "Session",
    "agreement",
    "agreement_by_node",
    "available_runtimes",
    "calibration_inputs",
    "check_parity",
    "export_onnx",
    "form_in",
    "int8_instructions",
    "is_quantized",
    "other_sizes",
    "parity",
    "sample_inputs",
    "session",
    "torch_session",
    "without_integers",
]
