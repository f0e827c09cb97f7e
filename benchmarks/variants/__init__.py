"""Kernels in several variants, of which only a GPU can tell the fastest. A program of its own, which needs no PyTorch to run."""
