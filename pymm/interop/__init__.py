"""Checkpoints of other libraries in pymm's models, and back."""

from pymm.interop.checkpoint import save
from pymm.interop.donors import to_donor
from pymm.interop.load import LoadReport, load_state

__all__ = ["LoadReport", "load_state", "save", "to_donor"]
