"""The ScaleKD method: projectors, heads and losses, as pure PyTorch.

In: the student's maps S3 and S4, its logits, labels, and the teacher's targets and tail. Out: seven weighted losses.
Upstream's code is not used, because it depends on mmengine and mmrazor and does not run unmodified.
tests/scalekd/test_parity.py compares these modules with a transcription of upstream's.
"""
