"""Publishes a finished cache at another place, and pulls a published one.

In: a folder with a finished cache and a place (hub, bucket or folder), or the reverse. Out: the same cache there.
Invariant: a place holds manifest.json only after every other file has arrived and was verified.
huggingface_hub and fsspec do the transfers.
"""
