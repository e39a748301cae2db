"""Benchmarks: one script per question, in one folder per topic; all use `harness.py`. Run them with `python -m`."""
