"""timm models by name: bringing weights to a folder."""

import pytest
import timm
import torch
from safetensors.torch import load_file

from scalekd_cache.errors import UserError
from scalekd_cache.zoo import fetch_weights

NAME = "vit_tiny_patch16_224"


def test_fetched_weights_are_the_models(tmp_path, monkeypatch):
    """No hub is asked here: timm's own constructor stands in for its pretrained one."""
    create, asked = timm.create_model, []

    def offline(name, pretrained):
        asked.append((name, pretrained))
        torch.manual_seed(1)
        return create(name, pretrained=False)

    monkeypatch.setattr(timm, "create_model", offline)
    file = fetch_weights(NAME, tmp_path / "teachers")
    assert asked == [(NAME, True)]
    assert [path.name for path in file.parent.iterdir()] == [f"{NAME}.safetensors"]
    torch.manual_seed(1)
    expected = create(NAME, pretrained=False).state_dict()
    found = load_file(file)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_weights_that_cannot_be_had_leave_nothing(tmp_path, monkeypatch):
    def offline(name, pretrained):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match="no network"):
        fetch_weights(NAME, tmp_path / "teachers")
    assert not (tmp_path / "teachers").exists()
    with pytest.raises(UserError, match="vit_tiny_patch16_224"):
        fetch_weights("vit_tiny_patch16_22", tmp_path / "teachers")
