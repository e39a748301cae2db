"""Benchmarks: one script a question, in the folder of the room that it measures; `harness.py` is shared."""
