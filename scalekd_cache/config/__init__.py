"""Options as frozen dataclasses, one file per stage, and the fingerprint of everything that affects cached bytes.

In: values from a YAML recipe and dotted overrides (`pipelines/` parses them). Out: checked, immutable configurations.
Each configuration validates itself. Checks that need two configurations, the data or the disk are in
`caching/preflight.py`. `options.py` merges layers of options, pydantic checks types, and `__post_init__` checks
ranges only.
"""
