import dataclasses
import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import LayerNorm2d

from scalekd_cache.config.stage1 import TeacherConfig
from scalekd_cache.errors import UserError
from scalekd_cache.models import timm_models as zoo
from scalekd_cache.models.tail import load_tail, tail_bytes
from scalekd_cache.models.teacher import (
    Teacher,
    check_tail,
    demo_teacher_args,
    load_teacher,
    split_tail,
    teacher_classes,
)
from scalekd_cache.models.teacher_spec import TeacherSpec, weights_digest
from scalekd_cache.models.timm_models import timm_name

torch.set_num_threads(1)
TOKENS = {"embed_dim": 48, "depth": 4, "num_heads": 3}
EVA_TOKENS = {**TOKENS, "num_heads": 2}
STAGES = {"depths": [1, 1, 1, 2], "dims": [8, 16, 32, 48]}
SAM = {**TOKENS, "global_attn_indexes": [0, 3], "window_size": 3, "neck_chans": 32}  # windows of 3 x 3 need padding
SAM2 = {"embed_dim": 24, "stages": [1, 2, 2, 2], "global_att_blocks": [6]}
# name, image size, model arguments, family, (C, H, W) of the features, (C3, H3, W3) of the tail's input
CASES = [
    ("demo_swin", 64, {}, "swin", (128, 4, 4), (64, 8, 8)),
    ("swin_tiny_patch4_window7_224", 128, {"embed_dim": 24, "depths": [1, 1, 1, 2]}, "swin", (192, 4, 4), (96, 8, 8)),
    (
        "swin_tiny_patch4_window7_224",  # shifted windows in the last stage, with an attention mask
        128,
        {"embed_dim": 24, "depths": [1, 1, 1, 2], "window_size": 2},
        "swin",
        (192, 4, 4),
        (96, 8, 8),
    ),
    ("swinv2_tiny_window8_256", 128, {"embed_dim": 24, "depths": [1, 1, 1, 2]}, "swin", (192, 4, 4), (96, 8, 8)),
    ("hiera_tiny_224", 128, {"embed_dim": 24, "stages": (1, 2, 2, 2)}, "hiera", (192, 4, 4), (96, 8, 8)),
    (
        "hiera_tiny_224",  # fewer poolings than stages: the last map stays unrolled, the tail keeps its grid
        64,
        {"embed_dim": 24, "stages": (1, 1, 1, 2), "q_pool": 2, "mask_unit_attn": (True, True, False, False)},
        "hiera",
        (192, 4, 4),
        (96, 4, 4),
    ),
    ("tiny_vit_5m_224", 64, {}, "tiny_vit", (320, 2, 2), (160, 4, 4)),
    ("vit_tiny_patch16_224", 64, {}, "vit", (192, 4, 4), (192, 4, 4)),
    ("vit_tiny_patch16_224", 64, {"global_pool": "avg", **TOKENS}, "vit", (48, 4, 4), (48, 4, 4)),
    ("deit_tiny_patch16_224", 64, TOKENS, "vit", (48, 4, 4), (48, 4, 4)),
    ("deit_tiny_distilled_patch16_224", 64, TOKENS, "vit", (48, 4, 4), (48, 4, 4)),
    ("vit_small_patch14_reg4_dinov2", 56, TOKENS, "vit", (48, 4, 4), (48, 4, 4)),
    ("beit_base_patch16_224", 64, TOKENS, "beit", (48, 4, 4), (48, 4, 4)),
    (
        "beit_base_patch16_224",
        64,
        {**TOKENS, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
        "beit",
        (48, 4, 4),
        (48, 4, 4),
    ),
    ("eva02_tiny_patch14_224", 56, {}, "eva", (192, 4, 4), (192, 4, 4)),
    ("eva02_base_patch16_clip_224", 64, EVA_TOKENS, "eva", (48, 4, 4), (48, 4, 4)),
    ("vit_small_patch16_dinov3_qkvb", 64, EVA_TOKENS, "eva", (48, 4, 4), (48, 4, 4)),
    ("vit_small_patch16_rope_mixed_224", 64, EVA_TOKENS, "eva", (48, 4, 4), (48, 4, 4)),  # an embedding per block
    ("vit_base_patch16_rope_mixed_ape_224", 64, EVA_TOKENS, "eva", (48, 4, 4), (48, 4, 4)),
    ("vit_small_patch16_dinov3", 64, EVA_TOKENS, "eva", (48, 4, 4), (48, 4, 4)),
    ("vit_pe_core_tiny_patch16_384", 64, EVA_TOKENS, "eva", (48, 4, 4), (48, 4, 4)),
    ("vit_pe_spatial_tiny_patch16_512", 64, EVA_TOKENS, "eva", (48, 4, 4), (48, 4, 4)),
    ("convnext_tiny.dinov3_lvd1689m", 64, STAGES, "convnext", (48, 2, 2), (32, 4, 4)),
    ("convnext_tiny", 64, {**STAGES, "head_norm_first": True}, "convnext", (48, 2, 2), (32, 4, 4)),
    ("convnextv2_atto", 64, STAGES, "convnext", (48, 2, 2), (32, 4, 4)),
    ("vit_base_patch16_siglip_224.v2_webli", 64, TOKENS, "vit", (48, 4, 4), (48, 4, 4)),
    ("vit_base_patch16_siglip_gap_224.v2_webli", 64, TOKENS, "vit", (48, 4, 4), (48, 4, 4)),
    ("naflexvit_base_patch16_siglip", 64, TOKENS, "vit", (48, 4, 4), (48, 4, 4)),
    ("naflexvit_base_patch16_radio_v3", 64, TOKENS, "vit", (48, 4, 4), (48, 4, 4)),
    ("naflexvit_base_patch16_par_gap", 64, TOKENS, "vit", (48, 4, 4), (48, 4, 4)),
    ("vit_base_patch16_clip_quickgelu_224.openai", 64, TOKENS, "vit", (48, 4, 4), (48, 4, 4)),
    ("samvit_base_patch16", 128, SAM, "vitdet", (32, 8, 8), (48, 8, 8)),
    ("samvit_base_patch16_224", 64, {**TOKENS, "neck_chans": 0}, "vitdet", (48, 4, 4), (48, 4, 4)),
    ("sam2_hiera_tiny", 128, SAM2, "hieradet", (192, 4, 4), (96, 8, 8)),
    ("hieradet_small", 128, SAM2, "hieradet", (192, 4, 4), (96, 8, 8)),
]
IDS = [f"{case[0]}-{number}" for number, case in enumerate(CASES)]


def make(name="demo_swin", size=64, args=None, num_classes=5, **options) -> Teacher:
    torch.manual_seed(0)
    config = TeacherConfig(name=name, **{"pretrained": False, **options})
    return load_teacher(
        config, image_size=size, num_classes=num_classes, device=torch.device("cpu"), model_args=args or {}
    )


def views(size: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def scramble(teacher: Teacher) -> Teacher:
    """Randomize all parameters: at initialization many biases, scales and position tables are zero or one."""
    generator = torch.Generator().manual_seed(2)
    for value in teacher.model.parameters():
        value += 0.1 * torch.randn(value.shape, generator=generator)
    return teacher


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_families(case, tmp_path):
    name, size, args, family, feature_shape, tail_shape = case
    teacher = scramble(make(name, size, args))
    spec, images = teacher.spec, views(size)
    assert (spec.family, spec.feature_shape, spec.tail_shape) == (family, feature_shape, tail_shape)
    output = teacher(images)
    assert output.features.shape == (2, *feature_shape)
    assert output.features.dtype == output.logits.dtype == torch.float32
    with torch.no_grad():
        x = teacher.normalize(images)
        if spec.has_classifier:
            assert torch.equal(output.logits, teacher.model(x))
        else:
            assert output.logits.shape == (2, 0)
        assert torch.allclose(output.features, reference_features(teacher.model, x), rtol=1e-5, atol=1e-5)
    assert check_tail(teacher, images) <= 1e-5

    split = split_tail(teacher)
    data = tail_bytes(split, teacher.spec)
    assert tail_bytes(split_tail(teacher), teacher.spec) == data
    (tmp_path / "tail.safetensors").write_bytes(data)
    loaded = load_tail(tmp_path / "tail.safetensors", TeacherSpec.from_json(json.loads(json.dumps(spec.to_json()))))
    assert not any(value.is_meta for value in [*loaded.parameters(), *loaded.buffers()])
    x3 = torch.randn(2, *tail_shape, requires_grad=True)
    outputs = [tail.train()(x3) for tail in (split, loaded)]
    assert outputs[0].shape == (2, *feature_shape)
    assert torch.equal(*outputs)
    outputs[1].square().sum().backward()
    assert x3.grad.abs().sum() > 0
    assert not any(module.training for module in loaded.modules())
    assert not any(value.requires_grad for value in loaded.parameters())


def reference_features(model, x):
    """Compare with timm's `forward_intermediates`: with norm, or with fc_norm / head.norm on every token."""
    if hasattr(model, "neck"):
        return model.forward_features(x)
    if not isinstance(getattr(model, "norm_pre", None), torch.nn.Identity | None) and hasattr(model, "stages"):
        return model.forward_features(x)
    normed = not isinstance(getattr(model, "norm", None), torch.nn.Identity | None)
    _, maps = model.forward_intermediates(x, indices=1, norm=normed)
    if normed:
        return maps[-1]
    if hasattr(model, "fc_norm"):
        return model.fc_norm(maps[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    if isinstance(model.head.norm, torch.nn.LayerNorm) and not isinstance(model.head.norm, LayerNorm2d):
        return model.head.norm(maps[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return model.head.norm(maps[-1])


def test_large_images_pass_a_few_at_a_time(monkeypatch):
    teacher = make("samvit_base_patch16", 1024, {**SAM, "depth": 1, "embed_dim": 6, "global_attn_indexes": []})
    assert teacher.spec.feature_shape == (32, 64, 64)
    assert teacher.images_per_pass == 3
    together = teacher._pass(views(1024, 4))
    seen = []
    monkeypatch.setattr(teacher, "_pass", lambda images: seen.append(len(images)) or Teacher._pass(teacher, images))
    output = teacher(views(1024, 4))
    assert seen == [3, 1]
    assert torch.allclose(output.features, together.features, atol=1e-5)
    assert output.logits.shape == (4, 0)


def test_patch_tokens_do_not_see_placeholders():
    """Without prefix tokens, BEiT's tail equals that of a model that has only patch tokens."""
    teacher = scramble(make("beit_base_patch16_224", 64, {**TOKENS, "use_rel_pos_bias": False}))
    tail = split_tail(teacher)
    x = torch.randn(2, 48, 4, 4)
    tokens = x.flatten(2).transpose(1, 2)
    for block in tail.body:
        tokens = block(tokens)
    expected = tail.norm(tokens).transpose(1, 2).unflatten(2, (4, 4))
    assert torch.allclose(tail(x), expected, rtol=1e-4, atol=1e-5)


def test_teacher_stays_in_eval_mode_and_frozen():
    teacher = make().train()
    assert not any(module.training for module in teacher.modules())
    assert not any(value.requires_grad for value in teacher.parameters())
    tail = split_tail(teacher)
    tail.enable_drop_path()
    assert any(module.training for module in tail.modules())
    assert not any(module.training for module in teacher.modules())


def test_bfloat16_returns_float32_close_to_it():
    exact, rough = make()(views(64)), make(precision="bfloat16")(views(64))
    assert rough.features.dtype == rough.logits.dtype == torch.float32
    assert not torch.equal(exact.features, rough.features)
    assert torch.allclose(exact.features, rough.features, atol=0.1)


@pytest.mark.slow
def test_compiled_blocks_give_close_outputs():
    """As the smoke run compiles them. No option compiles the teacher: the last bits of a cache would change."""
    teacher, images = scramble(make()), views(64)
    plain = teacher(images)
    for module in teacher.modules():
        if "Block" in type(module).__name__:
            module.compile(dynamic=False)
    compiled = teacher(images)
    torch.testing.assert_close(compiled.features, plain.features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compiled.logits, plain.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("value", "message"),
    [(views(32), "wrong dtype or shape"), (views(64).float(), "wrong dtype or shape")],
)
def test_wrong_images(value, message):
    with pytest.raises(UserError, match=message):
        make()(value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "swin_tiny_patch4_windw7_224"}, "swin_tiny_patch4_window7_224"),
        ({"name": "hf-hub:timm/vit_tiny_patch16_224"}, "there is no model hf-hub"),
        ({"name": "vit_tiny_patch16_224.nosuchtag"}, "augreg_in21k"),
        ({"name": "resnet18"}, "families swin, convnext, hiera, hieradet, vitdet, tiny_vit, vit"),
        ({"name": "vit_tiny_patch16_224", "size": 16}, "1x1"),
        ({"name": "vit_tiny_patch16_224", "args": {"nonsense": 1}}, "does not accept the argument nonsense"),
        ({"name": "vit_tiny_patch16_224", "args": {"checkpoint_path": "x.pt"}}, "not allowed"),
        ({"pretrained": True}, "no weights for the teacher demo_swin, which stage 1 trains"),
        ({"weights": "weights.pth"}, "pickle"),
        ({"weights": "missing.safetensors"}, "weights file is missing"),
    ],
)
def test_refused(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


def test_pretrained_without_a_network(monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(zoo.timm, "create_model", offline)
    with pytest.raises(UserError, match="scalekd fetch --teacher vit_tiny_patch16_224") as caught:
        make("vit_tiny_patch16_224", 224, pretrained=True)
    assert "--teacher-weights" in str(caught.value)
    assert "--pretrained false" in str(caught.value)
    config = TeacherConfig(name="vit_tiny_patch16_224", num_classes=7)
    with pytest.raises(UserError, match="a different number of classes"):
        load_teacher(config, image_size=224, num_classes=7, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "size", "classes"),
    [
        ("vit_tiny_patch16_224_in21k", 224, 21843),
        ("vit_small_patch16_224_dino", 224, 0),
        ("swinv2_base_window12_192_22k", 192, 21841),
        ("vit_tiny_patch16_224_in21k", 64, 21843),
    ],
)
def test_a_teacher_by_its_old_name_has_the_classes_of_its_weights(monkeypatch, name, size, classes):
    """Pretrained weights never get a random head for the dataset's classes."""
    create, asked = timm.create_model, {}

    def pretrained_model(name, pretrained, **args):
        asked.update(args, name=name, pretrained=pretrained)
        with torch.device("meta"):
            create(name, **args)
        raise ConnectionError("known enough")

    monkeypatch.setattr(zoo.timm, "create_model", pretrained_model)
    with pytest.raises(UserError, match="known enough"):
        make(name, size, pretrained=True)
    assert asked["num_classes"] == classes
    assert asked["name"] == timm.models.get_deprecated_models()[name]
    assert asked.get("img_size") == (None if size == zoo.default_image_size(asked["name"]) else size)


def test_weights_of_an_old_name_without_a_head(tmp_path):
    """A weights file determines the classifier, and the specification holds timm's current name."""
    path, name = tmp_path / "teacher.safetensors", "vit_small_patch16_224_dino"
    state = make(name, 64, TOKENS, num_classes=0).model.state_dict()
    save_file({key: value.clone() for key, value in state.items()}, path)
    teacher = make(name, 64, TOKENS, weights=str(path))
    assert teacher.spec.name == "vit_small_patch16_224.dino"
    assert not teacher.spec.has_classifier
    assert teacher(views(64)).logits.shape == (2, 0)


def test_weights_file(tmp_path):
    path = tmp_path / "teacher.safetensors"
    teacher = scramble(make(num_classes=7))
    save_file({name: value.clone() for name, value in teacher.model.state_dict().items()}, path)
    loaded = make(num_classes=5, weights=str(path), pretrained=True)
    assert loaded.spec.num_classes == 7
    assert loaded.spec.weights_sha256 == weights_digest(teacher.model.state_dict()) != teacher.spec.weights_sha256
    assert torch.equal(loaded(views(64)).logits, teacher(views(64)).logits)


@pytest.mark.parametrize(
    ("name", "size", "args"),
    [("demo_swin", 64, {}), ("tiny_vit_5m_224", 64, {}), ("deit_tiny_distilled_patch16_224", 64, TOKENS)],
)
def test_num_classes_0_leaves_out_the_classifier_of_a_weights_file(tmp_path, name, size, args):
    """What the README does with a teacher of ImageNet and photographs of other classes."""
    path = tmp_path / "teacher.safetensors"
    whole = make(name, size, args, num_classes=7)
    save_file({key: value.clone() for key, value in whole.model.state_dict().items()}, path)
    config = TeacherConfig(name=name, weights=str(path), num_classes=0, precision="float32")
    teacher = load_teacher(config, image_size=size, num_classes=5, device=torch.device("cpu"), model_args=args)
    assert not teacher.spec.has_classifier
    assert torch.equal(teacher(views(size)).features, whole(views(size)).features)
    assert teacher(views(size)).logits.shape == (2, 0)


def test_num_classes_0_leaves_out_the_classifier_of_pretrained_weights():
    config = TeacherConfig(name="tiny_vit_5m_224", num_classes=0)
    assert teacher_classes(config, timm_name("tiny_vit_5m_224"), None, 5) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("norm.weight"), "1 missing: norm.weight"),
        (lambda state: state.update(extra=torch.zeros(1)), "1 unexpected: extra"),
        (
            lambda state: state.update({"norm.weight": torch.zeros(3)}),
            r"norm.weight is \(3,\), but the model has \(128,\)",
        ),
        (lambda state: state["norm.weight"].fill_(float("nan")), "NaN or Inf"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, change, message):
    path = tmp_path / "teacher.safetensors"
    state = {name: value.clone() for name, value in make().model.state_dict().items()}
    change(state)
    save_file(state, path)
    with pytest.raises(UserError, match=message):
        make(weights=str(path))


def test_pickle_under_another_name_is_refused(tmp_path):
    path = tmp_path / "teacher.safetensors"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="renaming a pickle"):
        make(weights=str(path))


def test_weights_without_a_head(tmp_path):
    path = tmp_path / "teacher.safetensors"
    state = make().model.state_dict()
    save_file({name: value.clone() for name, value in state.items() if not name.startswith("head.fc")}, path)
    teacher = make(weights=str(path))
    assert not teacher.spec.has_classifier
    assert teacher(views(64)).logits.shape == (2, 0)


def test_tail_of_another_teacher_or_damaged(tmp_path):
    path = tmp_path / "tail.safetensors"
    teacher = make()
    path.write_bytes(tail_bytes(split_tail(teacher), teacher.spec))
    other = dataclasses.replace(teacher.spec, weights_sha256="0" * 64)
    with pytest.raises(UserError, match="different values for weights_sha256"):
        load_tail(path, other)
    tensors = load_file(path)
    tensors.pop("norm.weight")
    metadata = {"spec": json.dumps(teacher.spec.to_json())}
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(UserError, match=r"1 missing: norm\.weight"):
        load_tail(path, teacher.spec)
    save_file({**tensors, "norm.weight": torch.zeros(128, dtype=torch.float16)}, path, metadata=metadata)
    with pytest.raises(UserError, match="wrong dtype"):
        load_tail(path, teacher.spec)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match="the tail file has the wrong length"):
        load_tail(path, teacher.spec)


def test_tail_refuses_another_grid():
    with pytest.raises(UserError, match="wrong shape"):
        split_tail(make())(torch.zeros(1, 64, 7, 7))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", 3),
        ("num_classes", True),
        ("num_classes", -1),
        ("image_size", 64.0),
        ("mean", [0.5, 0.5]),
        ("std", [1.0, 0.0, 1.0]),
        ("std", [1.0, float("nan"), 1.0]),
        ("feature_shape", [192, 4, 2**60]),
        ("tail_shape", "abc"),
        ("weights_sha256", "xyz"),
        ("has_classifier", 1),
        ("model_args", {"norm_layer": {"deep": []}}),
        ("surplus", 1),
    ],
)
def test_spec_is_strict(field, value):
    plain = make().spec.to_json()
    assert TeacherSpec.from_json(plain).to_json() == plain
    with pytest.raises(UserError, match=field):
        TeacherSpec.from_json({**plain, field: value})


def test_spec_is_equal_after_json():
    spec = make("swin_tiny_patch4_window7_224", 64, {"embed_dim": 24, "depths": (1, 1, 1, 1)}).spec
    assert TeacherSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_digest_sees_names_types_and_shapes():
    base = {"a": torch.zeros(2, 2), "b": torch.ones(1)}
    variants = [
        base,
        {"a": torch.zeros(4), "b": torch.ones(1)},
        {"a": torch.zeros(2, 2, dtype=torch.int32), "b": torch.ones(1)},
        {"a": torch.zeros(2, 2), "c": torch.ones(1)},
        {"a": torch.zeros(2, 2), "b": torch.tensor(1.0)},
    ]
    assert len({weights_digest(state) for state in variants}) == len(variants)
    assert weights_digest(dict(reversed(base.items()))) == weights_digest(base)


def test_demo_args_build_with_plain_timm():
    model = timm.create_model(timm_name("demo_swin"), num_classes=10, **demo_teacher_args())
    assert sum(value.numel() for value in model.parameters()) < 500_000
