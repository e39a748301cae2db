"""Options: frozen dataclasses, one file per stage, and the fingerprint of everything that changes cached bytes.

In: values from a YAML recipe and dotted overrides (`pipelines/` parses them). Out: checked, immutable configurations.
A configuration that exists is valid on its own; checks that need two of them, the data or the disk are in
`caching/preflight.py`. `options.py` merges layers of options and pydantic checks their types; only ranges are checked
in `__post_init__`.
"""
