"""Uploads an exported student to a model hub with timm's function.

In: a folder that `timm_export.export_student` wrote, the name of a repository. Out: the URL of the commit.
Invariant: the hub receives exactly the files of the export. No pickle is uploaded.
"""

from pathlib import Path

from huggingface_hub import HfApi, errors
from timm.models import push_to_hf_hub

from scalekd_cache.convert.timm_export import CARD, DESCRIPTION, load_export, read_description
from scalekd_cache.errors import UserError
from scalekd_cache.store.checked_files import read_json

LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token with write access"


def push_export(folder: Path, repo: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload an exported student; `timm.create_model("hf-hub:user/name", pretrained=True)` then loads it.

    The model card is uploaded first: timm's function would otherwise write one with a default license.

    Args:
        folder: the export.
        repo: user/name; it is created if it does not exist.
        private: whether a new repository is private.
        token: token with write access (None: the one of `hf auth login` or HF_TOKEN).

    Returns:
        The URL of the commit.

    Raises:
        UserError: the export is damaged, no token, the hub cannot be reached, or it rejects the name or the upload.
    """
    description = read_description(folder)
    images = description.pretrained_cfg
    model = load_export(folder, images.input_size[-1])
    fields, _ = read_json(folder / DESCRIPTION, "the description of an exported student")
    api = HfApi(token=token)
    try:
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        if (folder / CARD).exists():
            api.upload_file(path_or_fileobj=folder / CARD, path_in_repo=CARD, repo_id=name)
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
    except errors.HFValidationError as error:
        raise UserError("not the name of a repository", got=repo, expected="user/name", fix=str(error)) from error
    except errors.LocalTokenNotFoundError as error:
        raise UserError("no access token for the model hub", where=api.endpoint, fix=LOGIN) from error
    except errors.HfHubHTTPError as error:
        denied = error.response is not None and error.response.status_code in (401, 403)
        got, fix = str(error).splitlines()[0], LOGIN if denied else "rerun; the upload starts again"
        raise UserError(
            "the model hub rejected the upload", got=got, where=f"{api.endpoint}/{repo}", fix=fix
        ) from error
    except (OSError, errors.HTTPError) as error:  # type: ignore[attr-defined]  # of the hub's HTTP library
        fix = "connect to a network (and unset HF_HUB_OFFLINE), then rerun"
        raise UserError("cannot reach the model hub", got=str(error), where=api.endpoint, fix=fix) from error
    return str(done.commit_url)
