"""The room scalekd."""
