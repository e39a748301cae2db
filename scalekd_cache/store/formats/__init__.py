"""The two file formats for a shard: a tar with a byte-offset index, and a Zarr v3 group.

In: records for one view of a range of images. Out: one shard's files, or its records.
Both implement `ShardWriter` and `ShardReader` from `store/base.py` and run the same conformance suite. The tar
reader and the Zarr reader and writer are custom; `store/__init__.py` gives the reasons.
"""
