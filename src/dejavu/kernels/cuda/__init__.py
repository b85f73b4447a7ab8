"""Triton kernels of the cuda engine, each beside its plain-torch definition. Nothing here is imported where Triton is missing."""
