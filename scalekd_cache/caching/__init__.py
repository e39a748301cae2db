"""Stage 1: run the teacher once over augmented views and write a cache.

In: a `CacheTeacherConfig` and a job's processes. Out: a cache's committed work units, tail and manifest.
`job.py` runs the job, `prepare.py` loads and checks its inputs, `job_plan.py` plans the units, and `make_units.py`
makes them from the views provided by `sample_views.py`. `codec_selection.py` selects the codec, `preflight.py` and
`size_probe.py` run checks and measurements before the work starts, and `pixel_cache.py` reads views from an existing
cache. Units are assigned by custom code, because DistributedSampler needs a fixed world size. Ranks claim units through
a counter in torchrun's store, so they may join and leave.
"""
