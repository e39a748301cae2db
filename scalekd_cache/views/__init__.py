"""Augmented views: sampling, applying to an image, JSON records, encoded pixels.

In: the view recipe, a sample key, a view number and an image. Out: a `View` record and (size, size, 3) uint8 pixels.
`view.py` samples and applies views, `randaugment.py` holds the fifteen operations, `pixels.py` encodes and decodes.
Written here although timm and torchvision have these transforms: theirs sample from global random state and do not
return what they sampled, so a view could not be stored and replayed.
"""
