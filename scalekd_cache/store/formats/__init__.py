"""The two file formats for a shard: a tar with a byte-offset index, and a Zarr v3 group.

In: records of one view of a range of images. Out: the files of one shard, or its records.
Both implement `ShardWriter` and `ShardReader` of `store/base.py`, and one conformance suite runs on both. The tar
reader and the Zarr reader and writer are custom code; `store/__init__.py` gives the reasons.
"""
