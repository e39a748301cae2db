"""Augmented views as explicit records, and their pixels as bytes."""
