"""Stage 1: run the teacher once over augmented views and write a cache.

In: a `CacheTeacherConfig` and the processes of a job. Out: the committed work units, tail and manifest of a cache.
`job.py` runs the job, `prepare.py` opens and checks what it needs, `job_plan.py` plans its units, `make_units.py` makes
them from `sample_views.py`; `codec_selection.py` selects the codec, `preflight.py` and `size_probe.py` check and
measure before the work starts, and `pixel_cache.py` reads views from an existing cache. Unit assignment is custom code,
because DistributedSampler needs a fixed world size. It counts claims in torchrun's store, so ranks may join and leave.
"""
