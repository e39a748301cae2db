"""Publishes a finished cache to a destination, and pulls published caches.
In: a finished cache in a local folder and a destination (hub, bucket or folder), or vice versa. Out: a copy of the
cache.
Invariant: manifest.json is written only after all other files have been transferred and verified. Transfers use
huggingface_hub and fsspec.
"""
