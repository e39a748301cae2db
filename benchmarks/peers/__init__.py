"""Comparisons with other libraries (peers): reading, codecs, a training step, backbones without labels.

In: this package and a package index, from which the other libraries are installed into a separate environment in
build/peers (`environment.py`). Out: tables in docs/PEERS.md, results in benchmarks/results/peers-*.json.
Invariant: ours and a peer get the same samples and are timed alternately in one process. Only complete training runs
(`backbones.py`) run in separate processes.
"""
