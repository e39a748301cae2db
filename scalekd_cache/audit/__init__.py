"""Checks of a finished cache: bytes, records, the teacher re-run on a sample, repairs, gradients."""
