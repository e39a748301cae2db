"""Checks and repairs of a cache (`verify --deep`, `repair`, `inspect`, `prove`).

In: the folder or URL of a cache; for some checks, also its dataset and its teacher's weights.
Out: problems with their locations on disk, repaired units, facts about one record, or a comparison of gradients.
`store/verify.py` checks files and checksums. This package adds the checks that need the codecs, the images or the
teacher. Tensors are checked with custom code because no schema library checks decoded features.
"""

RERUN_VIEWS = 16
"""Default number of random views on which a check re-runs the teacher."""
