"""Triton kernels of pymm's ops, one file per op, installed as `pymm.triton_kernels`.

No GPU has run them yet: they are tested in Triton's interpreter and compiled for sm_80, sm_90 and sm_100.
"""
