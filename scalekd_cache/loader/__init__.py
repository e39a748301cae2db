"""From a cache to training batches.

In: an open cache, a seed, the rank and world size. Out: micro-batches of pixels, labels and encoded targets.
`order.py` defines the sample order, `loader.py` reads batches in worker processes, `record_pixels.py` decodes or
replays the pixels of a record and compares digests.
Custom code instead of WebDataset's loader: the order must be the same for any number of ranks and workers, a run must
be resumable within an epoch, and a short or damaged shard must be an error.
"""
