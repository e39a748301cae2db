"""From a cache to training batches.

In: an open cache, a seed, the rank and world size. Out: micro-batches of pixels, labels and encoded targets.
`order.py` decides which sample comes when, `loader.py` reads batches in worker processes, `pixels.py` decodes or
replays the pixels of a record and compares digests.
Written by hand although WebDataset has a loader: the order must be the same for any number of ranks and workers, the
position must be resumable within an epoch, and a short or damaged shard must be an error.
"""
