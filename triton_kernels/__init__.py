"""Triton kernels of pymm's ops, one file per op, installed as `pymm.triton_kernels`. There is none yet."""
