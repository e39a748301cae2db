"""Stage 1: images and a teacher become the committed units of a cache."""
