"""The method: projectors, heads and losses of ScaleKD."""
