"""Checkpoints of other libraries in pymm's models."""

from pymm.interop.load import LoadReport, load_state

__all__ = ["LoadReport", "load_state"]
