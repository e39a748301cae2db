"""Stage 2: a student is trained from a cache under DeepSpeed."""
