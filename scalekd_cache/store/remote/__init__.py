"""Caches at a URL: each file is downloaded once, verified, and read from the local copy.

In: a URL (file, http, https, s3, gs). Out: a `RemotePath`, which readers use like a `Path`.
fsspec transfers the files. Two parts are custom: the folder of local copies (fsspec's own file cache neither verifies
SHA-256 nor limits its size across processes), and bounded retries with a single error format.
"""
