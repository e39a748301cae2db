"""Data sets: images, with or without labels, from a folder, a list, tars, parquet files or a data set known by name.

In: `DataConfig` (a path or a name) and a split. Out: a `Source`: sample keys, labels, the encoded bytes of each image.
`source.py` opens any data set; `folder.py`, `path_list.py`, `shards.py`, `parquet.py` and `builtin.py` hold one kind
each; `held_out.py` divides a data set without labels; `images.py` decodes an image; `workers.py` runs worker processes
for any data set.
Custom code instead of a library: tar reading (a damaged tar must raise; WebDataset stops without an error) and the
transfer from workers (DataLoader takes one file descriptor per tensor and hangs when shared memory is full).
"""
