"""Top-k logits and logits recomputed from features: stored values, and the loss computed from them."""

import dataclasses

import pytest
import torch
from small_cache import CPU, make, shared_weights
from small_trainer import config_of, finish, trainer_of

from scalekd_cache.caching.job_plan import make_logit_codec
from scalekd_cache.codec.logits import logit_codec_from_config
from scalekd_cache.codec.recomputed import FILE, RecomputedLogits, classifier_bytes, load_classifier
from scalekd_cache.codec.top_k import TopKLogits
from scalekd_cache.config.stage1 import StoreConfig, TeacherConfig
from scalekd_cache.errors import UserError
from scalekd_cache.models.teacher import load_teacher
from scalekd_cache.scalekd.losses import logit_loss, partial_logit_loss
from scalekd_cache.training.targets import load_cache_classifier
from scalekd_cache.training.trainer import start_processes


def logits_of(rows, classes, spread=4.0, seed=0):
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed)) * spread


def test_top_k_keeps_the_most_probable_exactly_and_the_mass_of_the_rest():
    logits, codec = logits_of(50, 1000), TopKLogits(1000, 10)
    records = codec.encode(logits)
    assert {len(record) for record in records} == {codec.record_bytes} == {80}
    exact = logits.double().log_softmax(1)
    for row, record in enumerate(records):
        decoded = torch.from_numpy(codec.decode(record)).double()
        kept = decoded > -torch.inf
        assert set(kept.nonzero().flatten().tolist()) == set(exact[row].topk(10).indices.tolist())
        assert torch.allclose(decoded[kept], exact[row][kept], atol=1e-6)
        assert float(1 - decoded.exp().sum()) == pytest.approx(float(exact[row][~kept].exp().sum()), abs=1e-6)
    again = logit_codec_from_config(codec.get_config())
    assert again.get_config() == codec.get_config()
    assert again.encode(logits) == records


def by_hand(student, teacher, keep):
    """Cross entropy over keep + 1 events: each stored class, and all others as one event."""
    p, q = teacher.double().softmax(1), student.double().softmax(1)
    total = 0.0
    for row in range(len(p)):
        top = p[row].topk(keep).indices.tolist()
        rest = [index for index in range(p.shape[1]) if index not in top]
        total -= sum(float(p[row, index]) * float(q[row, index].log()) for index in top)
        total -= float(p[row, rest].sum()) * float(q[row, rest].sum().log())
    return total / len(p)


@pytest.mark.parametrize("keep", [1, 3, 11])
def test_the_loss_is_the_cross_entropy_of_the_events(keep):
    teacher, student = logits_of(6, 12), logits_of(6, 12, 2.0, seed=1).requires_grad_()
    codec = TopKLogits(12, keep)
    target = torch.stack([torch.from_numpy(codec.decode(record)) for record in codec.encode(teacher)])
    loss = partial_logit_loss(student, target, weight=0.5)
    assert float(loss.detach()) == pytest.approx(0.5 * by_hand(student.detach(), teacher, keep), rel=1e-5)
    loss.backward()
    assert student.grad.isfinite().all()
    if keep == 11:  # the rest is a single class, so nothing is lost
        dense = logits_of(6, 12, 2.0, seed=1).requires_grad_()
        logit_loss(dense, teacher, weight=0.5).backward()
        assert torch.allclose(student.grad, dense.grad, atol=1e-6)
    # A student with the teacher's probabilities is at the minimum; renormalizing would move it.
    best = teacher.clone().requires_grad_()
    partial_logit_loss(best, target).backward()
    assert float(best.grad.abs().max()) < 1e-6


def test_extreme_rows_stay_finite():
    target = torch.full((2, 5), -torch.inf)
    target[0, 3] = 0.0  # all mass on one class
    target[1] = torch.tensor([0.2] * 5).log()  # all probabilities are known
    student = torch.tensor([[0.0, 0, 0, -200, 200], [0.0, 1, 2, 3, 4]], requires_grad=True)
    loss = partial_logit_loss(student, target)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda record: record[:-1], "bytes"),
        (lambda record: b"\xff" * 4 + record[4:], "classes"),
        (lambda record: record[4:8] + record[4:], "classes"),
        (lambda record: record[:12] + b"\x00\x00\xc0\x7f" + record[16:], "sum"),
        (lambda record: record[:12] + b"\x00\x00\x80\x3f" * 3, "sum"),
    ],
)
def test_damaged_records_are_refused(change, named):
    codec = TopKLogits(9, 3)
    (record,) = codec.encode(logits_of(1, 9))
    with pytest.raises(UserError, match=named):
        codec.decode(change(record))


@pytest.mark.parametrize("k", [0, 9, 10, 2**40])
def test_numbers_that_make_no_sense_are_refused(k):
    with pytest.raises(UserError, match="invalid number of top-k classes"):
        TopKLogits(9, k)


def test_caches_without_dense_logits_train(tmp_path):
    """Caches of the same images and maps: top-k has the teacher's probabilities, recomputed logits the stored ones."""
    start_processes(CPU)
    dense = make(tmp_path / "dense", shared_weights(), cache={"codec": "float32"})
    kept = make(tmp_path / "none", shared_weights(), cache={"codec": "float32", "logits": "recomputed"})
    top = make(tmp_path / "top", shared_weights(), cache={"codec": "float32", "logits": "top_k", "top_k": 9})
    assert {bytes(record.logits) for record in kept.read([0, 1, 2], 0)} == {b""}
    config = config_of(train={"epochs": 1})
    losses = {}
    for name, cache in (("dense", dense), ("none", kept), ("top", top)):
        trainer = trainer_of(config, cache=cache)
        losses[name] = finish(trainer).column("logit")
    assert losses["none"] == pytest.approx(losses["dense"], rel=1e-5)
    assert losses["top"] == pytest.approx(losses["dense"], rel=1e-5)  # nine of ten: the tenth is the rest
    sharp = dataclasses.replace(config, scalekd=dataclasses.replace(config.scalekd, temperature=2.0))
    with pytest.raises(UserError, match="only temperature 1"):
        load_cache_classifier(sharp, top, logit_codec_from_config(top.manifest.facts.logit_codec), CPU)
    (kept.root / FILE).write_bytes(b"other")
    with pytest.raises(UserError, match="classifier is damaged"):
        load_classifier(kept.manifest.facts.logit_codec, kept.root)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_teacher_of_any_precision_is_accepted(precision):
    """In bfloat16 the teacher's own logits have 8 bits: its classifier is checked in its own precision."""
    config = TeacherConfig(weights=str(shared_weights()), precision=precision)
    teacher = load_teacher(config, image_size=64, num_classes=10, device=torch.device("cpu"))
    codec = make_logit_codec(StoreConfig(logits="recomputed"), teacher, exact=False)
    assert isinstance(codec, RecomputedLogits)
    images = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)
    wrong = teacher(images)._replace(logits=teacher(images.flip(0)).logits)
    with pytest.raises(UserError, match="cannot recompute"):
        classifier_bytes(teacher.model, wrong.features, wrong.logits, teacher.autocast_dtype)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_teacher_that_normalizes_after_pooling_is_refused(precision):
    dtype = getattr(torch, precision)
    config = TeacherConfig(name="vit_tiny_patch16_224", pretrained=False, precision=precision)
    teacher = load_teacher(config, image_size=64, num_classes=5, device=torch.device("cpu"))
    output = teacher(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    with pytest.raises(UserError, match="cannot recompute"):
        classifier_bytes(teacher.model, output.features, output.logits, dtype)
