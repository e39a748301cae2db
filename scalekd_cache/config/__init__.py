"""Options: frozen dataclasses, one file per stage, and the fingerprint of everything that changes cached bytes.

In: values from a YAML recipe and dotted overrides (`pipelines/` parses them). Out: checked, immutable configurations.
A configuration that exists is valid on its own; checks that need two of them, the data or the disk are in
`caching/preflight.py`. Parsing is jsonargparse's job; only the checks in `__post_init__` are written here.
"""
