"""Workloads, runner and results of pymm's measurements, installed as `pymm.benchmarks`.

A workload is a row of an op's record (`pymm.ops.REGISTRY[name].workloads()`); `run` is `pymm bench`.
"""

from pymm.benchmarks.command import BenchSettings, run

__all__ = ["BenchSettings", "run"]
