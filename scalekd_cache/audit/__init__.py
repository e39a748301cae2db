"""Checks and repairs a cache (`verify --deep`, `repair`, `inspect`, `prove`).

In: a cache's folder or URL; for some checks, also its dataset and its teacher's weights.
Out: problems with their locations on disk, repaired units, facts about a record, or a gradient comparison.
`store/verify.py` checks files and checksums. This package adds the checks that need the codecs, the images or the
teacher. Tensor checks are custom because no schema library can check decoded features.
"""

RERUN_VIEWS = 16
"""Default number of random views on which a check re-runs the teacher."""
