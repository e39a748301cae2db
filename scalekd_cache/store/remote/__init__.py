"""Caches behind URLs: paths, transfers, verified local copies."""
