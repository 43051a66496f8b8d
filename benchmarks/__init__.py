"""Workloads, runner and results of pymm's measurements, installed as `pymm.benchmarks`.

A workload is a row of an op's record (`pymm.ops.REGISTRY[name].workloads()`) or of `composed`; `run` is
`pymm bench`; `schema` is the format of its results.
"""

from pymm.benchmarks.command import BenchSettings, run

__all__ = ["BenchSettings", "run"]
