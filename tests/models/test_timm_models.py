"""timm models by name, and downloading weights to a folder."""

import pytest
import timm
import torch
from safetensors.torch import load_file

from scalekd_cache.errors import UserError
from scalekd_cache.models.timm_models import check_name, create_timm_model, default_image_size, fetch_weights

NAME = "vit_tiny_patch16_224"


def test_fetched_weights_are_the_models(tmp_path, monkeypatch):
    """No network: timm's plain constructor replaces its pretrained one."""
    create, asked = timm.create_model, []

    def offline(name, pretrained):
        asked.append((name, pretrained))
        torch.manual_seed(1 if pretrained else 2)
        return create(name, pretrained=False)

    monkeypatch.setattr(timm, "create_model", offline)
    file = fetch_weights(NAME, tmp_path / "teachers")
    assert asked[0] == (NAME, True)
    assert [path.name for path in file.parent.iterdir()] == [f"{NAME}.safetensors"]
    torch.manual_seed(1)
    expected = create(NAME, pretrained=False).state_dict()
    found = load_file(file)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_fetched_weights_have_no_random_head(tmp_path, monkeypatch):
    weights_of(monkeypatch, train("blocks."))
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: None)
    file = fetch_weights(NAME, tmp_path)
    assert not any(name.startswith("head.") for name in load_file(file))


def test_weights_that_cannot_be_had_leave_nothing(tmp_path, monkeypatch):
    def offline(name, pretrained):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match="no network"):
        fetch_weights(NAME, tmp_path / "teachers")
    assert not (tmp_path / "teachers").exists()
    with pytest.raises(UserError, match="vit_tiny_patch16_224"):
        fetch_weights("vit_tiny_patch16_22", tmp_path / "teachers")


OLD = {
    "vit_base_patch16_224_in21k": ("vit_base_patch16_224.augreg_in21k", 21843, 224),
    "vit_small_patch16_224_dino": ("vit_small_patch16_224.dino", 0, 224),
    "swin_base_patch4_window12_384_in22k": ("swin_base_patch4_window12_384.ms_in22k", 21841, 384),
    "swinv2_large_window12_192_22k": ("swinv2_large_window12_192.ms_in22k", 21841, 192),
    "vit_base_patch16_224_miil_in21k": ("vit_base_patch16_224_miil.in21k", 11221, 224),
}


@pytest.mark.parametrize("name", OLD)
def test_old_names_mean_the_weights_that_timm_maps_them_to(name):
    current, classes, size = OLD[name]
    assert check_name(name, "teacher") == check_name(current, "teacher") == current
    assert timm.get_pretrained_cfg(current).num_classes == classes
    assert default_image_size(current) == size


def test_every_old_name_is_resolved_or_refused():
    for name, current in timm.models.get_deprecated_models().items():
        try:
            assert check_name(name, "teacher") == current
        except UserError as error:  # timm has no weights with this tag
            assert current.partition(".")[2] in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("https://huggingface.co/timm/resnet50.a1_in1k/", "resnet50.a1_in1k"),
        ("huggingface.co/timm/resnet50.a1_in1k/tree/main", "resnet50.a1_in1k"),
        ("ResNet50.A1_IN1K", "resnet50.a1_in1k"),
        (" resnet50 ", "resnet50"),
    ],
)
def test_a_name_as_copied_is_answered_with_one_that_works(typed, name):
    with pytest.raises(UserError, match=rf"did you mean {name}\?"):
        check_name(typed, "teacher")


@pytest.mark.parametrize("name", ["resnet50.", "resnet50..", "mixer_b14_224.", "resnet50.a1_in1k."])
def test_a_dot_without_a_tag_is_a_message(name):
    with pytest.raises(UserError, match="there is no"):
        check_name(name, "teacher")


@pytest.mark.parametrize("prefix", ["hf-hub:timm/", "hf_hub:timm/", "timm/", "https://huggingface.co/timm/"])
@pytest.mark.parametrize("name", [NAME, f"{NAME}.augreg_in21k", "vit_base_patch16_224_in21k"])
def test_names_as_copied_from_a_models_page(prefix, name):
    with pytest.raises(UserError, match=rf"did you mean {name}\?"):
        check_name(prefix + name, "teacher")


def weights_of(monkeypatch, change):
    """Replace timm's pretrained weights by random ones of another seed, which a test may change."""
    create = timm.create_model

    def pretrained_model(name, pretrained=False, **args):
        if not pretrained:
            return create(name, **args)
        model = create(name, **args)
        with torch.no_grad():
            change(model)
        return model

    monkeypatch.setattr(timm, "create_model", pretrained_model)


def train(*names):
    """Add one to the tensors whose names start with the prefix."""

    def change(model):
        for name, value in model.named_parameters():
            if name.startswith(names):
                value += 1

    return change


@pytest.mark.parametrize("distilled", [False, True])
def test_a_head_that_is_not_in_the_weights_is_removed(monkeypatch, distilled):
    """A model's custom loader, for which timm does not know whether it loaded a head (a plugin, or npz files)."""
    name = "deit_tiny_distilled_patch16_224" if distilled else NAME
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: None)
    heads = ("head.", "head_dist.")
    small = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    with monkeypatch.context() as patch:
        weights_of(patch, train("blocks."))
        model, used = create_timm_model(name, {**small, "num_classes": 7}, pretrained=True)
    assert model.num_classes == used["num_classes"] == 0
    assert not any(key.startswith(heads) for key in model.state_dict())
    with monkeypatch.context() as patch:
        weights_of(patch, train("blocks.", *heads))
        model, used = create_timm_model(name, {**small, "num_classes": 7}, pretrained=True)
    assert model.num_classes == used["num_classes"] == 7


def test_a_head_of_another_number_of_classes_is_removed(monkeypatch):
    """timm drops the pretrained head if the caller sets another number of classes."""
    weights_of(monkeypatch, train("blocks."))
    model, used = create_timm_model(NAME, {"num_classes": 7}, pretrained=True)
    assert model.num_classes == used["num_classes"] == 0


def test_models_without_a_classifier_stay_without(monkeypatch):
    weights_of(monkeypatch, train("blocks."))
    model, used = create_timm_model(NAME, {"num_classes": 0}, pretrained=True)
    assert model.num_classes == used["num_classes"] == 0
