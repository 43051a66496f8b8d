"""Checkpoints of other libraries in pymm's models, and back."""

from pymm.interop.checkpoint import save
from pymm.interop.donors import to_donor
from pymm.interop.export import export, export_onnx
from pymm.interop.load import LoadReport, load_state

__all__ = ["LoadReport", "export", "export_onnx", "load_state", "save", "to_donor"]
