"""Workloads, runner and results of pymm's measurements, installed as `pymm.benchmarks`."""
