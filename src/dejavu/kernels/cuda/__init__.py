"""Triton kernels of the cuda engine, each with its plain-torch definition. Nothing here is imported where Triton is missing."""
