"""The tools that benchmarks/ptq.py compares, each a script for an interpreter of its own."""
