"""Custom loops: the losses of `scalekd distill`, resuming, and students with wrong outputs."""

import json
import subprocess
import sys

import pytest
import torch
from cache_forms import FORMS
from commands import ROOT
from small_cache import CPU, copy_of_cache, shared_cache
from sparse_cache import finished
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.utils.data import DataLoader

import scalekd_cache
from scalekd_cache import Cache, CachedTargets, ScaleKDLoss, timm_student
from scalekd_cache.config.stage2 import FEW_CLASSES_WEIGHTS, DistillConfig, ScaleKDConfig, StudentConfig
from scalekd_cache.errors import UserError
from scalekd_cache.loader.loader import CacheLoader
from scalekd_cache.models.student import build_student
from scalekd_cache.scalekd.heads import make_heads
from scalekd_cache.training.custom_loop import CachedBatch
from scalekd_cache.training.targets import TargetSource, load_cache_tail, make_order
from scalekd_cache.training.trainer import DistillModel

GLOBAL = 16


class CustomStudent(nn.Module):
    """Two maps and logits, without timm."""

    def __init__(self, classes=10):
        super().__init__()
        self.stem, self.last, self.head = nn.Conv2d(3, 8, 8, 8), nn.Conv2d(8, 16, 2, 2), nn.Linear(16, classes)

    def forward(self, images):
        s3 = self.stem(images)
        s4 = self.last(s3)
        return s3, s4, self.head(s4.mean((2, 3)))


def test_the_package_imports_without_torch():
    code = """
import sys
import scalekd_cache
assert "torch" not in sys.modules and "numpy" not in sys.modules
assert {"Cache", "CachedTargets", "ScaleKDLoss"} <= set(dir(scalekd_cache))
scalekd_cache.Cache
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = scalekd_cache.nothing


def test_a_record_by_key_and_view():
    cache = Cache.open(shared_cache().root)
    for view, position in ((0, 0), (1, 95), (0, 40)):
        expected = cache.read([position], view)[0]
        assert cache[expected.key, view] == expected
        assert cache.position(expected.key, view) == position
    with pytest.raises(UserError, match=r"(?s)no such sample.*keys.txt, such as digits/"):
        _ = cache["nothing", 0]
    with pytest.raises(UserError, match="no such view"):
        _ = cache[expected.key, 7]


def test_an_open_cache_at_the_end_of_a_script_prints_nothing():
    root, key = str(shared_cache().root), shared_cache().read([0], 0)[0].key
    code = f"import scalekd_cache\ncache = scalekd_cache.Cache.open({root!r})\ncache[{key!r}, 0]"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("", "")


def small_targets(**options):
    return CachedTargets(shared_cache(), batch_size=GLOBAL, **options)


def test_the_losses_are_those_of_make_distill():
    cache, given = shared_cache(), DistillConfig(student=StudentConfig(name="test_resnet"))
    config = given.on_data(classes=10)
    assert given.scalekd.spatial_weight is None
    torch.manual_seed(0)
    student = build_student(config.student, num_classes=10, image_size=64)
    tail = load_cache_tail(cache)
    model = DistillModel(config, student, [make_heads(config, student, tail)])
    order = make_order(config.train, cache, CPU)
    loader = CacheLoader(cache, order, epochs=1, global_batch=GLOBAL, micro_batch=GLOBAL)
    batch = next(iter(loader))
    expected = model(batch.images, batch.labels, [TargetSource(loader.codecs[0])(batch)], [tail]).terms
    torch.manual_seed(0)
    targets = small_targets()
    student = timm_student("test_resnet", targets)
    loss = ScaleKDLoss(targets, student, given.scalekd)
    assert loss.config == config.scalekd
    images, labels, target = next(iter(targets))
    assert (images.dtype, images.shape) == (torch.float32, (GLOBAL, 3, 64, 64))
    assert labels.tolist() == batch.labels.tolist()
    terms = loss(*student(images), labels, target)
    torch.testing.assert_close(tuple(terms), tuple(expected), rtol=1e-6, atol=1e-7)
    assert min(terms[:6]) > 0 == terms.pooled  # only linear heads compare pooled features
    assert set(loss.state_dict()) == {f"heads.{name}" for name in loss.heads.state_dict()}  # does not contain the tail
    assert sum(parameter.numel() for parameter in loss.parameters()) == sum(p.numel() for p in loss.heads.parameters())


def test_a_custom_loop_has_the_loss_weights_of_the_caches_recipe(capsys):
    targets = small_targets()
    capsys.readouterr()  # of the cache, if this test is the first to use it
    loss = ScaleKDLoss(targets, timm_student("test_resnet", targets))
    kept = targets.cache.manifest.facts.distill["scalekd"]
    assert {name: getattr(loss.config, name) for name in kept} == kept != {}
    said = capsys.readouterr().out
    assert said == "loss weights: spatial 0.005, frequency 0.004 and 0.004, logits 0.5, from the cache's recipe demo " \
        "(override with config=)\n"  # fmt: skip
    ScaleKDLoss(targets, timm_student("test_resnet", targets), ScaleKDConfig())
    assert capsys.readouterr().out == ""
    kept.clear()  # a recipe without weights
    loss = ScaleKDLoss(targets, timm_student("test_resnet", targets))
    assert loss.config.feature_weights() == FEW_CLASSES_WEIGHTS
    assert capsys.readouterr().out == said.replace("recipe demo ", "recipe demo for 10 classes ")


@pytest.mark.parametrize("convert", [nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm])
def test_a_student_with_synchronized_batchnorm_has_the_same_heads(convert):
    targets = small_targets()
    student = timm_student("test_resnet", targets)
    before = ScaleKDLoss(targets, student, ScaleKDConfig()).state_dict().keys()
    assert any("running_mean" in name for name in before)
    student.replace_model(convert(student.model))
    assert ScaleKDLoss(targets, student, ScaleKDConfig()).state_dict().keys() == before


def test_a_custom_loop_has_the_same_batches_with_workers():
    torch.manual_seed(0)
    targets = [small_targets(workers=count) for count in (0, 2)]
    student = timm_student("test_resnet", targets[0])
    for own, loaded in zip(*targets, strict=True):
        for one, other in zip((own.images, *own.targets[:3]), (loaded.images, *loaded.targets[:3]), strict=True):
            assert (one.stride(), torch.equal(one, other)) == (other.stride(), True)
        assert torch.equal(student(own.images).s4, student(loaded.images).s4)


def test_a_custom_loop_resumes():
    whole = [batch.labels.tolist() for batch in small_targets(epochs=2)]
    assert len(whole) == len(small_targets(epochs=2)) == 2 * 96 // GLOBAL
    first = small_targets(epochs=2)
    batches = iter(first)
    begun = [next(batches).labels.tolist() for _ in range(5)]
    state = json.loads(json.dumps(first.state_dict()))
    second = small_targets(epochs=2)
    second.load_state_dict(state)
    assert begun + [batch.labels.tolist() for batch in second] == whole
    with pytest.raises(UserError, match=r"(?s)different sample order.*got: seed=0\n.*expected: seed=1\n"):
        small_targets(epochs=2, seed=1).load_state_dict(state)


@pytest.mark.parametrize("state", [CustomStudent().state_dict(), {}, None, "state.pt", [3]])
def test_a_state_of_something_else(state):
    with pytest.raises(UserError, match=r"(?s)not a state of CachedTargets.*CachedTargets.state_dict\(\)"):
        small_targets().load_state_dict(state)


COVERED = r"(?s)one iteration already covers all epochs.*12 batches already read, the total for epochs=2.*epochs=N"


@pytest.mark.parametrize("stop_at_last", [False, True])
@pytest.mark.parametrize("wrap", [iter, lambda targets: DataLoader(targets, batch_size=None)])
def test_a_second_pass_is_an_error(wrap, stop_at_last):
    targets = small_targets(epochs=2)
    batches = iter(wrap(targets))
    for _ in range(12):
        next(batches)
    if not stop_at_last:
        assert next(batches, None) is None
    with pytest.raises(UserError, match=COVERED):
        next(iter(wrap(targets)))
    targets.load_state_dict({**targets.state_dict(), "step": 10})
    assert len(list(wrap(targets))) == 2


@pytest.mark.parametrize("persistent", [False, True])
def test_a_second_pass_of_a_data_loader_with_workers_is_an_error(persistent):
    """Each pass has new processes, or continues in the old ones. Passes that stop early begin at the same batch."""
    targets = small_targets(epochs=2)
    loader = DataLoader(targets, batch_size=None, num_workers=2, persistent_workers=persistent)
    peeks = [next(iter(loader)).labels.tolist() for _ in range(2)]
    assert peeks[0] == peeks[1]
    assert [batch.labels.tolist() for batch in loader] == [batch.labels.tolist() for batch in small_targets(epochs=2)]
    with pytest.raises(UserError, match=COVERED):
        next(iter(loader))
    targets.load_state_dict({**targets.state_dict(), "step": 12})  # a finished run, resumed
    if not persistent:
        assert list(loader) == []
    with pytest.raises(UserError, match=COVERED):
        next(iter(loader))


def test_a_finished_loop_resumes_without_batches():
    targets = small_targets()
    targets.load_state_dict({**targets.state_dict(), "step": len(targets)})
    assert list(targets) == []
    with pytest.raises(UserError, match="already covers all epochs"):
        list(targets)


def test_a_loop_resumes_from_a_cache_that_grew():
    before = small_targets(views=1, epochs=2)
    batches = iter(before)
    for _ in range(3):
        next(batches)
    state = before.state_dict()
    with pytest.raises(
        UserError,
        match=r"(?s)number of views.*got: views=1 .*expected: views=2,.*CachedTargets\(..., views=1",
    ):
        small_targets(epochs=2).load_state_dict(state)
    after = small_targets(views=1, epochs=2)
    after.load_state_dict(state)
    assert [batch.labels.tolist() for batch in after] == [batch.labels.tolist() for batch in batches]
    with pytest.raises(UserError, match="fewer views than requested"):
        small_targets(views=3)
    with pytest.raises(UserError, match=r"train\.views"):
        small_targets(views=0)


@pytest.mark.parametrize("place", [lambda cache: cache, lambda cache: cache.root, lambda cache: str(cache.root)])
def test_a_loss_and_a_student_of_a_cache_or_its_folder(place):
    cache = place(shared_cache())
    student = timm_student("test_resnet", cache)
    given = ScaleKDConfig(projector="linear", logit_weight=0.25)
    assert ScaleKDLoss(cache, student, {"projector": "linear", "logit_weight": 0.25}).config == \
        ScaleKDLoss(small_targets(), student, given).config  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [((nn.Identity(), nn.Identity()), "this is not a cache"), ((None, nn.Identity()), "this is not a cache"),
     (([3], nn.Identity()), "this is not a cache"), ((shared_cache, "resnet18"), "student has the wrong type"),
     ((shared_cache, CustomStudent(), "linear"), "config has the wrong type"),
     ((shared_cache, CustomStudent(), {"projektor": "linear"}), "projector")],
)  # fmt: skip
def test_arguments_of_a_loss_with_wrong_types(arguments, said):
    first, *rest = arguments
    with pytest.raises(UserError, match=said):
        ScaleKDLoss(first() if first is shared_cache else first, *rest)


def test_a_custom_student_learns():
    torch.manual_seed(0)
    targets = small_targets(epochs=4)
    student = CustomStudent()
    loss = ScaleKDLoss(
        targets, student, ScaleKDConfig(spatial_weight=0.005, frequency_weight_s3=0.004, frequency_weight_s4=0.004)
    )
    optimizer = torch.optim.AdamW([*student.parameters(), *loss.parameters()], lr=3e-3)
    totals = []
    for images, labels, target in targets:
        terms = loss(*student(images), labels, target)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        totals.append(terms.total.item())
    assert sum(totals[-6:]) < 0.9 * sum(totals[:6])
    assert student.training


@pytest.mark.parametrize(
    ("module", "said"),
    [(nn.Flatten(), "got: Tensor"), (CustomStudent(classes=3), "(1, 3)"), (nn.Identity(), "got: Tensor")],
)
def test_students_with_wrong_outputs(module, said):
    with pytest.raises(UserError, match="must return") as error:
        ScaleKDLoss(shared_cache(), module)
    assert said in str(error.value)
    assert "logits (B, 10)" in str(error.value)
    assert 'timm_student("name", targets)' in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"labels": 4, "targets": 3}, r"^targets must.*got: \(16,\).*expected: Targets"),
     ({"targets": ()}, r"^targets must.*got: nothing"), ({"targets": None}, r"^targets must.*got: NoneType"),
     ({"s3": 1, "s4": 0}, r"^s3 has the wrong shape.*got: \(16, 16, 4, 4\).*expected: \(16, 8, 8, 8\)"),
     ({"s4": 2}, r"^s4 has.*got: \(16, 10\).*expected: \(16, 16, 4, 4\)"),
     ({"logits": 3, "labels": 2}, r"^logits has.*got: \(16,\).*expected: \(16, 10\)"),
     ({"labels": 2}, r"^labels has.*got: \(16, 10\).*expected: \(16,\)"),
     ({"s3": torch.zeros(16, 8, 4, 4)}, r"^s3 has.*got: \(16, 8, 4, 4\)"),
     ({"labels": [3]}, r"^labels has.*got: list")],
)  # fmt: skip
def test_arguments_of_a_step_that_are_swapped_or_have_wrong_shapes(change, said):
    """An integer in `change` is the position of another argument."""
    student = CustomStudent()
    loss = ScaleKDLoss(shared_cache(), student)
    images, labels, target = next(iter(small_targets()))
    right = (*student(images), labels, target)
    given = dict(zip(("s3", "s4", "logits", "labels", "targets"), right, strict=True))
    assert loss(**given).total.isfinite()
    assert tuple(loss(**{**given, "targets": [target]})) == tuple(loss(**given))
    wrong = {name: right[value] if isinstance(value, int) else value for name, value in change.items()}
    with pytest.raises(UserError, match=rf"(?s){said}.*call loss\(s3, s4, logits, labels, targets\)"):
        loss(**{**given, **wrong})


def test_bad_batches():
    with pytest.raises(UserError, match="the batch has more images than the cache"):
        CachedTargets(shared_cache(), batch_size=97)
    with pytest.raises(UserError, match=r"there is no cache nowhere .*create it with"):
        CachedTargets("nowhere", batch_size=1)
    with pytest.raises(UserError, match=r"create it with `scalekd cache-teacher --data demo`"):
        CachedTargets("caches/demo", batch_size=1)


def test_a_misspelled_folder(tmp_path):
    copy_of_cache(tmp_path / "demo")
    for use in (Cache.open, lambda place: CachedTargets(place, batch_size=8), lambda place: timm_student("x", place)):
        with pytest.raises(UserError, match=r"no cache .*/dmo: did you mean .*/demo\?.*create it with"):
            use(str(tmp_path / "dmo"))


# Ranks and workers


def images_of(batches):
    return [batch.images for batch in batches]


@pytest.fixture(autouse=True)
def without_a_process_group(monkeypatch):
    """Earlier tests of this process may have started one."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)


def as_rank(monkeypatch, rank, world_size, **options):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    return small_targets(**options)


@pytest.mark.parametrize("form", ["plain", "sparse"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_ranks_of_a_custom_loop_share_every_global_batch(monkeypatch, form, world_size):
    """Side by side, the batches of all ranks are those of one process, so every sample comes once."""
    cache = {"plain": shared_cache, "sparse": finished}[form]()
    every = cache.manifest.facts.features_every
    sizes = {"batch_size": 4 * every // 2, "epochs": 2}
    ranks = []
    for rank in range(world_size):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        targets = CachedTargets(cache, **sizes)
        ranks.append(images_of(targets))
        assert len(ranks[rank]) == len(targets)
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    one = CachedTargets(cache, **{**sizes, "batch_size": world_size * sizes["batch_size"]})
    together = [torch.cat(steps) for steps in zip(*ranks, strict=True)]
    if form == "plain":
        assert all(torch.equal(a, b) for a, b in zip(together, images_of(one), strict=True))
    seen = [image.numpy().tobytes() for batch in together[: len(together) // 2] for image in batch]
    assert len(set(seen)) == len(seen)
    if form == "plain":
        assert len(seen) == len(cache)


@pytest.mark.parametrize(("form", "workers"), [*((form, 2) for form in FORMS), ("plain", 1)])
def test_torchs_data_loader_gives_the_same_batches(form, workers):
    """Also from a resumed position."""

    def targets(step=0):
        made = CachedTargets(FORMS[form](), batch_size=8, epochs=2)
        made.load_state_dict({**made.state_dict(), "step": step})
        return made

    expected = list(targets())
    assert len(DataLoader(targets(), batch_size=None)) == len(expected)
    for step in (0, 3):
        loader = DataLoader(targets(step), batch_size=None, num_workers=workers)
        for got, batch in zip(loader, expected[step:], strict=True):
            assert isinstance(got, CachedBatch)
            assert torch.equal(got.labels, batch.labels)
            torch.testing.assert_close([got.images, *got.targets], [batch.images, *batch.targets], rtol=0, atol=0)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_default_batch_size_of_torchs_data_loader_gives_the_batches_as_they_are(workers):
    for got, batch in zip(DataLoader(small_targets(), num_workers=workers), small_targets(), strict=True):
        assert isinstance(got, CachedBatch)
        assert torch.equal(got.images, batch.images)
        assert torch.equal(got.targets.features, batch.targets.features)


def test_batches_of_batches_are_an_error():
    with pytest.raises(UserError, match=r"(?s)complete batches.*batch_size other.*batch_size=None") as caught:
        next(iter(DataLoader(small_targets(), batch_size=5)))
    assert "batch_size=2" not in str(caught.value)


def test_workers_inside_a_data_loader_are_an_error():
    with pytest.raises(UserError, match="cannot start workers or use a GPU"):
        next(iter(DataLoader(small_targets(workers=1), batch_size=None, num_workers=1)))


def test_a_process_group_made_after_the_targets_is_an_error(monkeypatch):
    targets = small_targets()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        UserError, match=r"(?s)before the process group.*rank 1, world size 2 now; rank 0, world size 1"
    ):
        next(iter(targets))


def test_a_batch_of_all_ranks_may_not_be_larger_than_the_cache(monkeypatch):
    with pytest.raises(UserError, match="the global batch of 7 processes has more images than the cache"):
        as_rank(monkeypatch, 0, 7)


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("batch_size", -4), ("batch_size", 2.5), ("epochs", 0), ("epochs", -1), ("workers", -1),
     ("seed", 2**63), ("image_size", -3), ("std", (0.2, 0.0, 0.2)), ("mean", (0.5,)), ("mean", (float("nan"),) * 3),
     ("batch_size", "many"), ("views", "x"), ("feature_share", "x"), ("mean", 0.5), ("mean", "abc"), ("std", None),
     ("mean", (123.0, 116.0, 103.0)), ("std", (58, 57, 57))],
)  # fmt: skip
def test_arguments_of_a_loop_that_are_out_of_range(name, value):
    with pytest.raises(UserError, match="invalid value"):
        CachedTargets(shared_cache(), **{"batch_size": 8, name: value})


def test_arguments_of_a_loop_as_other_types():
    """They are converted, as in a recipe and on the command line."""
    text = {"batch_size": "16", "epochs": "2", "views": "2", "image_size": "64", "workers": "0", "seed": "0"}
    mean = {"mean": [0.5, 0.4, 0.3], "std": torch.tensor([0.2, 0.25, 0.3])}
    given, expected = (
        CachedTargets(shared_cache(), **options)
        for options in ({**text, **mean}, {"batch_size": 16.0, "epochs": 2, "mean": (0.5, 0.4, 0.3),
                                           "std": (0.2, 0.25, 0.3)})
    )  # fmt: skip
    assert given.state_dict() == expected.state_dict()
    assert len(given) == len(expected) == 12
    torch.testing.assert_close(next(iter(given)).images, next(iter(expected)).images)


def test_a_loop_without_a_cache():
    with pytest.raises(UserError, match="at least one cache"):
        CachedTargets([], batch_size=8)
