"""Options: rejected values, valid defaults, immutability, the fingerprint."""

import dataclasses

import pytest

from scalekd_cache.config.base import fingerprint, to_plain
from scalekd_cache.config.options import build
from scalekd_cache.config.stage1 import CacheTeacherConfig, DataConfig, StoreConfig, TeacherConfig, ViewConfig
from scalekd_cache.config.stage2 import (
    FEW_CLASSES_WEIGHTS,
    PUBLISHED_WEIGHTS,
    DistillConfig,
    OptimConfig,
    ScaleKDConfig,
    StudentConfig,
    TrainConfig,
)
from scalekd_cache.errors import UserError

CLASSES = [
    DataConfig,
    ViewConfig,
    TeacherConfig,
    StoreConfig,
    CacheTeacherConfig,
    StudentConfig,
    ScaleKDConfig,
    OptimConfig,
    TrainConfig,
    DistillConfig,
]
REFUSED = [
    (DataConfig, "data", "max_samples", [0, -1], [1, None]),
    (ViewConfig, "views", "size", [7, 4097], [8, 4096]),
    (ViewConfig, "views", "crop_scale", [(0.0, 1.0), (0.5, 0.4), (0.5, 1.1)], [(0.3, 0.3)]),
    (ViewConfig, "views", "crop_ratio", [(-1.0, 1.0), (2.0, 1.0)], [(1.0, 1.0)]),
    (ViewConfig, "views", "erase_area", [(0.0, 0.1), (0.5, 1.5), (0.3, 0.2)], [(0.1, 1.0)]),
    (ViewConfig, "views", "erase_ratio", [(0.0, 1.0), (2.0, 1.0)], [(1.0, 2.0)]),
    (ViewConfig, "views", "flip_probability", [-0.1, 1.1], [0.0, 1.0]),
    (ViewConfig, "views", "erase_probability", [-0.1, 1.1], [0.0, 1.0]),
    (ViewConfig, "views", "randaugment_ops", [-1, 16], [0, 15]),
    (ViewConfig, "views", "randaugment_magnitude", [-0.1, 10.1], [0.0, 10.0]),
    (ViewConfig, "views", "randaugment_magnitude_std", [-0.1], [0.0]),
    (ViewConfig, "views", "jpeg_quality", [0, 101], [1, 100]),
    (ViewConfig, "views", "seed", [-1, 2**63], [0, 2**63 - 1]),
    (TeacherConfig, "teacher", "batch_size", [0], [1]),
    (StoreConfig, "cache", "num_views", [0, 10_001], [1, 10_000]),
    (StoreConfig, "cache", "views_per_group", [0, 65], [1, 64]),
    (StoreConfig, "cache", "samples_per_shard", [0, 65_537], [1, 65_536]),
    (CacheTeacherConfig, "", "workers", [-1, 257], [0, 256]),
    (StudentConfig, "student", "drop_path", [-0.1, 1.0], [0.0, 0.9]),
    (StudentConfig, "student", "std", [(0.2, 0.0, 0.2)], [(1.0, 1.0, 1.0)]),
    (ScaleKDConfig, "scalekd", "logit_weight", [-0.1, 1.1], [0.0, 1.0]),
    (ScaleKDConfig, "scalekd", "temperature", [0.0, -1.0], [0.1]),
    (ScaleKDConfig, "scalekd", "spatial_weight", [-0.1], [0.0]),
    (ScaleKDConfig, "scalekd", "frequency_weight_s3", [-0.1], [0.0]),
    (ScaleKDConfig, "scalekd", "frequency_weight_s4", [-0.1], [0.0]),
    (OptimConfig, "optim", "lr", [0.0, -1.0], [1e-9]),
    (OptimConfig, "optim", "base_batch_size", [0], [1]),
    (OptimConfig, "optim", "weight_decay", [-1e-9], [0.0]),
    (OptimConfig, "optim", "momentum", [-0.1, 1.0], [0.0, 0.99]),
    (OptimConfig, "optim", "warmup_epochs", [-1.0], [0.0]),
    (OptimConfig, "optim", "clip_norm", [-1.0], [0.0]),
    *((TrainConfig, "train", name, [0, -1], [1]) for name in (
        "epochs", "micro_batch_size", "shuffle_block", "shuffle_window", "log_every", "checkpoint_epochs",
        "keep_checkpoints", "eval_epochs")),
    (TrainConfig, "train", "global_batch_size", [0, -32], [32, 64]),
    (TrainConfig, "train", "micro_batch_size", [48, 257], [256]),
    (TrainConfig, "train", "label_smoothing", [-0.1, 1.0], [0.0, 0.9]),
    (TrainConfig, "train", "ema_decay", [-0.1, 1.0], [0.0, 0.9999]),
    (TrainConfig, "train", "workers", [-1, 257], [0, 256]),
]  # fmt: skip


@pytest.mark.parametrize(("owner", "section", "name", "bad", "good"), REFUSED)
def test_values_out_of_range_are_refused_by_their_option(owner, section, name, bad, good):
    for value in good:
        assert getattr(owner(**{name: value}), name) == value
    for value in bad:
        with pytest.raises(UserError) as error:
            owner(**{name: value})
        option = f"{section}.{name}".lstrip(".")
        assert str(error.value).startswith(f"invalid value for {option}: {value} (expected ")


@pytest.mark.parametrize(
    ("group", "owner", "name", "value", "text"),
    [
        ("scalekd", ScaleKDConfig, "typo", 1, "there is no option scalekd.typo: did you mean scalekd.tpp? ("),
        ("scalekd", ScaleKDConfig, "temprature", 2, "did you mean scalekd.temperature"),
        ("scalekd", ScaleKDConfig, "share", 0.5, "did you mean scalekd.feature_share or scalekd.teacher_shares? ("),
        (
            "scalekd",
            ScaleKDConfig,
            "projector",
            "x",
            "scalekd.projector: x (expected cap, lite, linear or linear-tpp; ",
        ),
        ("scalekd", ScaleKDConfig, "heads_s3", -1, "invalid value for scalekd.heads_s3: -1 (expected 0 to 2^63 - 1)"),
        ("scalekd", ScaleKDConfig, "attention_scale", float("inf"), "scalekd.attention_scale: inf (expected a finite"),
        ("views", ViewConfig, "interpolation", "x", "views.interpolation: x (expected bilinear or bicubic)"),
    ],
)
def test_a_class_has_the_errors_of_the_command(group, owner, name, value, text):
    command = {"scalekd": DistillConfig, "views": CacheTeacherConfig}[group]
    with pytest.raises(UserError) as typed:
        build(command, {f"{group}.{name}": str(value)})
    for wrong in (lambda: owner(**{name: value}), lambda: dataclasses.replace(owner(), **{name: value})):
        with pytest.raises(UserError) as called:
            wrong()
        assert str(called.value) == str(typed.value)
    assert text in str(typed.value)


@pytest.mark.parametrize("classes", [0, 1, 2, 10, 20, 21, 1000])
def test_feature_weights_follow_the_number_of_classes(classes):
    rule = FEW_CLASSES_WEIGHTS if classes in (2, 10, 20) else PUBLISHED_WEIGHTS

    def weights(**given):
        scalekd = DistillConfig(scalekd=ScaleKDConfig(**given)).on_data(classes=classes).scalekd
        return {name: getattr(scalekd, name) for name in rule}

    assert weights() == rule
    for name in rule:  # a number that is set is used, the others still follow the rule
        for value in (0.0, 0.03, PUBLISHED_WEIGHTS[name], FEW_CLASSES_WEIGHTS[name]):
            assert weights(**{name: value}) == {**rule, name: value}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_lamb_runs_at_zero_0_only(stage):
    lamb = OptimConfig(name="lamb")
    DistillConfig(optim=lamb)
    DistillConfig(train=TrainConfig(zero=stage))
    with pytest.raises(UserError, match=f"LAMB(.|\n)*train.zero={stage}"):
        DistillConfig(optim=lamb, train=TrainConfig(zero=stage))


def test_a_moving_average_needs_whole_weights():
    DistillConfig(train=TrainConfig(zero=2, ema_decay=0.9))
    with pytest.raises(UserError, match="EMA needs the full weights"):
        DistillConfig(train=TrainConfig(zero=3, ema_decay=0.9))


def test_options_for_speed_are_refused_where_they_cannot_work():
    DistillConfig(train=TrainConfig(compile=True, channels_last=True))
    for changed in (
        {"train": TrainConfig(zero=1, channels_last=True)},
        {"train": TrainConfig(zero=3, compile=True)},
        {"train": TrainConfig(compile=True), "student": StudentConfig(grad_checkpointing=True)},
    ):
        with pytest.raises(UserError, match=r"channels-last weights need ZeRO 0|train\.compile supports neither"):
            DistillConfig(**changed)


@pytest.mark.parametrize("owner", CLASSES)
def test_options_are_frozen_keyword_only_and_documented(owner):
    config = owner()
    for field in dataclasses.fields(owner):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, None)
        assert field.kw_only
    assert config == owner()
    assert hash(config) == hash(owner())


def test_plain_options_are_what_json_gives_back():
    plain = to_plain(CacheTeacherConfig())
    assert plain["views"]["crop_scale"] == [0.08, 1.0]
    assert plain["data"]["devkit"] is None
    assert to_plain(DistillConfig())["student"]["mean"] == [0.485, 0.456, 0.406]


def test_smoothing_that_no_loss_would_use_is_refused():
    with pytest.raises(UserError, match=r"train\.label_smoothing(?s:.*)label_loss=bce"):
        TrainConfig(label_loss="bce", label_smoothing=0.1)


def test_the_fingerprint_does_not_depend_on_key_order():
    fields = to_plain(ViewConfig())
    assert fingerprint(fields) == fingerprint(dict(reversed(fields.items())))
    assert fingerprint({"a": {"x": 1, "y": 2}}) == fingerprint({"a": {"y": 2, "x": 1}})
    assert fingerprint({"a": [1, 2]}) != fingerprint({"a": [2, 1]})
    assert fingerprint({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"  # kept in caches


def test_the_fingerprint_changes_with_every_field():
    fields = to_plain(ViewConfig())
    seen = {fingerprint(fields)}
    for name, value in fields.items():
        other = (
            value * 2 + 1 if isinstance(value, int | float) else [*value, 1] if isinstance(value, list) else value + "x"
        )
        seen.add(fingerprint({**fields, name: other}))
    assert len(seen) == len(fields) + 1


def test_the_fingerprint_refuses_what_json_has_no_word_for():
    with pytest.raises(ValueError, match="JSON compliant"):
        fingerprint({"a": float("nan")})
