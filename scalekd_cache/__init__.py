"""scalekd-cache: run a frozen ViT teacher once, keep what students need, train any number of students from it."""

__version__ = "0.1.0"
