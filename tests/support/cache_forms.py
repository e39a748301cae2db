"""Small caches of every form that training and other pipelines read: stores, sparse, unlabeled, shared, replayed."""

import functools
import tempfile
from pathlib import Path

import sparse_cache
from small_cache import make, shared_cache, shared_weights
from unlabeled_cache import unlabeled_cache, unlabeled_pictures


@functools.cache
def _holder():
    return tempfile.TemporaryDirectory(prefix="forms-")


@functools.cache
def sharing(logits):
    """A cache that shares the pixels of the small one, with another form of logits."""
    root = Path(_holder().name) / logits
    return make(
        root, shared_weights(), cache={"pixels_from": str(shared_cache().root), "logits": logits, "top_k": 3}
    )  # fmt: skip


@functools.cache
def with_class_token():
    """A cache without labels whose records hold the class token as pooled embedding, and logits."""
    data = {"source": str(unlabeled_pictures()), "max_samples": 16}
    teacher = {"name": "test_vit", "pretrained": False, "weights": None, "num_classes": 10}
    return make(Path(_holder().name) / "token", None, data=data, teacher=teacher)


FORMS = {
    "plain": shared_cache,
    "zarr, sparse": lambda: sparse_cache.finished(backend="zarr"),
    "sparse": sparse_cache.finished,
    "unlabeled": unlabeled_cache,
    "unlabeled, class token": with_class_token,
    "replayed": lambda: shared_cache("replayed"),
    "shared pixels, top-k": lambda: sharing("top_k"),
    "shared pixels, recomputed": lambda: sharing("recomputed"),
}
"""By name, a function that returns the finished cache; tests must not change it."""
