"""The room remote."""
