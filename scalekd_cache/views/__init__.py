"""Augmented views: samples them, applies them to an image, and converts them to JSON records and encoded pixels.

In: the view recipe, a sample key, a view number and an image. Out: a `View` record and (size, size, 3) uint8 pixels.
`view.py` samples and applies views, `randaugment.py` implements the fifteen operations, and `pixels.py` encodes and
decodes pixels. This is custom code because timm's and torchvision's transforms sample from global random state and do
not return the sampled parameters, so their views could not be stored and replayed.
"""
