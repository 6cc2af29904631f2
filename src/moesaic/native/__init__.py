"""Kernels that PyTorch has no fast form of, in C++, compiled on the machine where they run."""
