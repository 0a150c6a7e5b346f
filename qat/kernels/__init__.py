"""Kernels: operators behind one dispatch, each beside its reference."""
