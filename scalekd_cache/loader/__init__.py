"""Loads training batches from a cache.

In: an open cache, a seed, and the rank and world size. Out: micro-batches of pixels, labels and encoded targets.
`order.py` defines the sample order, `loader.py` reads batches in worker processes, and `record_pixels.py` decodes or
replays a record's pixels and compares digests. WebDataset's loader is not used because it does not meet three
requirements: the sample order must not depend on the number of ranks and workers, a run must be resumable within an
epoch, and a short or damaged shard must raise an error.
"""
