"""The cache on disk: a plan, units made of shards in one of two file formats, and a manifest that covers all units.

In: records. Out: the same records, or an error. Importing the readers and writers imports neither torch nor zarr.
`formats/` holds the two shard formats; `remote/` reads a cache at a URL through verified local copies.

These parts are custom instead of coming from libraries: the tar reader, which uses an index and pread (WebDataset stops
without an error at a truncated tar, and its `.decode()` unpickles); the Zarr reader and writer (zarr-python 3.1 returns
zeros for a missing chunk or file); file locks (libraries poll or leave stale lock files); and atomic writes that are
read back after fsync.
"""
