"""Checks and repairs of a cache (`verify --deep`, `repair`, `inspect`, `prove`).

In: the folder or URL of a cache; for some checks also its data set and the weights of its teacher.
Out: problems with their place on disk, repaired units, facts about one record, or a comparison of gradients.
The checks of files and checksums are in `store/verify.py`. This room adds what needs the codecs, the images or the
teacher. Tensors are checked with custom code because no schema library checks decoded features.
"""

RERUN_VIEWS = 16
"""Random views on which a check re-runs the teacher, by default."""
