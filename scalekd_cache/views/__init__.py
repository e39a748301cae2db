"""Augmented views: sampling, applying to an image, JSON records, encoded pixels.

In: the view recipe, a sample key, a view number and an image. Out: a `View` record and (size, size, 3) uint8 pixels.
`view.py` samples and applies views, `randaugment.py` holds the fifteen operations, `pixels.py` encodes and decodes.
Custom code instead of timm's or torchvision's transforms: those sample from global random state and do not return the
sampled parameters, so views could not be stored and replayed.
"""
