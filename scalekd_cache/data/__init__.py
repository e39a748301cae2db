"""Datasets: images, with or without labels, from a folder, a list, tars, parquet files or a built-in dataset.

In: `DataConfig` (a path or a name) and a split. Out: a `Source`: sample keys, labels and encoded images.
`source.py` opens any dataset; `folder.py`, `path_list.py`, `shards.py`, `parquet.py` and `builtin.py` each handle one
kind; `held_out.py` splits a dataset without labels; `images.py` decodes images; `workers.py` runs worker processes for
any dataset. Two parts are custom instead of coming from a library: reading tars (WebDataset stops without an error at a
damaged tar) and transferring items from workers (DataLoader uses one file descriptor per tensor and hangs when shared
memory is full).
"""
