"""Kernels behind one frozen KernelSet, bound once at load. Imports nothing from `model` or `msa`."""
