"""The room caching."""
