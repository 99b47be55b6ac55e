"""Kernels: products with packed weights that do not decode all of them first."""
