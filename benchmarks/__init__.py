"""Benchmarks: one command for each claim, each writing one file under results/."""
