"""Benchmarks against the libraries that users would choose instead: reading, codecs, a training step.

In: nothing but this package and a package index: the other libraries are installed into build/peers, an environment of
their own (`environment.py`). Out: tables in docs/PEERS.md, results in benchmarks/results/peers-*.json.
Invariant: ours and a peer are timed alternately, in one process, on the same samples.
"""
