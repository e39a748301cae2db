"""Records of a cache become training batches, in an order that only depends on seed and step."""
