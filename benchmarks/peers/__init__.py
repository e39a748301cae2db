"""Benchmarks against the libraries that users would choose instead: reading, codecs, a training step,
backbones without labels.

In: nothing but this package and a package index: the other libraries are installed into build/peers, an environment of
their own (`environment.py`). Out: tables in docs/PEERS.md, results in benchmarks/results/peers-*.json.
Invariant: ours and a peer get the same samples; they are timed alternately, in one process, except whole training runs
(`backbones.py`), which have a process each.
"""
