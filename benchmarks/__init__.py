"""Benchmarks: one script per question, in a folder per room; `harness.py` is shared. Run with `python -m`."""
