"""The ScaleKD method: projectors, heads and losses, as pure PyTorch.

In: the student's maps S3 and S4, its logits, labels, the teacher's targets and tail. Out: six weighted loss terms.
Custom code: upstream's code depends on mmengine and mmrazor and does not run unmodified. tests/scalekd/test_parity.py
compares these modules with a transcription of upstream's.
"""
