"""The two file formats of a shard: tar with an index, and Zarr."""
