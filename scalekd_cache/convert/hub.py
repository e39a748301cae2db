"""Uploads an exported student to a model hub with timm's upload function.

In: a folder written by `timm_export.export_student`, and a repository name. Out: the commit URL.
Invariant: the hub receives exactly the exported files, and no pickles. Only the code in the model card changes: it
loads the repository instead of the folder.
"""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from timm.models import push_to_hf_hub

from scalekd_cache.convert.timm_export import CARD, DESCRIPTION, load_export, read_description, without_source
from scalekd_cache.models.hub import upload_errors
from scalekd_cache.store.checked_files import read_json


def push_export(folder: Path, repo: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload an exported student, which `timm.create_model("hf-hub:user/name", pretrained=True)` can then load.

    The model card is uploaded first, because timm's function would otherwise write one with a default license.

    Args:
        folder: the export.
        repo: the repository as user/name, which is created if it does not exist.
        private: whether to make a new repository private.
        token: a token with write access (None: from `hf auth login` or HF_TOKEN).

    Returns:
        The commit URL.

    Raises:
        UserError: the export is damaged, there is no token, or the hub is unreachable or rejects the name or upload.
    """
    description = read_description(folder)
    images = description.pretrained_cfg
    model: Any = load_export(folder, images.input_size[-1])
    model.pretrained_cfg = without_source(model)
    fields, _ = read_json(folder / DESCRIPTION, "an exported student's description")
    api = HfApi(token=token)
    with upload_errors(api.endpoint, repo, "rerun to restart the upload"):
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        if (folder / CARD).exists():
            card = _card_on_hub((folder / CARD).read_text(encoding="utf-8"), name)
            api.upload_file(path_or_fileobj=card.encode(), path_in_repo=CARD, repo_id=name)
        done = push_to_hf_hub(
            model,
            name,
            token=token,
            private=private,
            model_args=description.model_args,
            model_config={"label_names": description.label_names},
            data_config=fields["pretrained_cfg"],
            safe_serialization=True,
        )
    return str(done.commit_url)


def _card_on_hub(card: str, repo: str) -> str:
    """A model card whose code loads the student from the hub."""
    card = re.sub(r"""(['"])local-dir:.*?\1""", lambda _: ascii(f"hf-hub:{repo}"), card)
    return re.sub(r"(?m)^Run this in the folder that contains .*:$", "Load the student:", card)
