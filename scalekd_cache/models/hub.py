"""Accesses the model hub. On offline machines, requests fail within seconds, and errors say what to do.

In: huggingface_hub's settings. Out: a context manager for downloads, and one for uploads.
Invariant: files in the hub's local cache are found even if the hub does not respond. Without these context managers,
huggingface_hub retries for about a minute. Error messages contain no token.
"""

import contextlib
import queue
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants, errors
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from scalekd_cache.errors import UserError
from scalekd_cache.store.durable_files import raise_disk_error
from scalekd_cache.store.remote.url_transfer import without_password

LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token with write access"
TIMEOUT_S = 3.0
"""Timeout in seconds for the hub's first response, including DNS lookup."""


def hub_answers() -> bool:
    """Whether the hub responds within `TIMEOUT_S`. The request uses proxies from the environment."""
    answers: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def ask() -> None:
        try:
            request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
            with urllib.request.urlopen(request, timeout=TIMEOUT_S):
                answers.put(True)
        except urllib.error.HTTPError:  # an error response is still a response
            answers.put(True)
        except (OSError, ValueError):
            answers.put(False)

    threading.Thread(target=ask, daemon=True).start()  # DNS lookup has no timeout
    try:
        return answers.get(timeout=TIMEOUT_S)
    except queue.Empty:
        return False


@contextlib.contextmanager
def hub_or_cache() -> Iterator[None]:
    """Context manager in which downloads use only the local cache if the hub does not respond.

    Raises:
        ConnectionError: HF_HUB_OFFLINE is set or the hub does not respond, and the requested file is not in the local
            cache.
        UserError: the local cache is on a full or read-only disk.
    """
    offline = constants.is_offline_mode()
    if not offline and hub_answers():
        try:
            yield
        except OSError as error:
            raise_disk_error(error, Path(constants.HF_HUB_CACHE), 0)
            raise
        return
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, urllib.error.URLError) as error:
        why = "HF_HUB_OFFLINE is set (unset it to download)" if offline else f"no connection to {constants.ENDPOINT}"
        raise ConnectionError(f"{why}, and the file is not in the local cache") from error
    finally:
        constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def upload_errors(endpoint: str, where: str, resume: str) -> Iterator[None]:
    """Context manager for uploads that turns huggingface_hub's errors into `UserError`.

    Args:
        endpoint: the hub's address.
        where: the repository name.
        resume: the fix to print if the upload is rejected for a reason other than access rights.
    """
    try:
        try:
            yield
        except RuntimeError as error:  # raised by an upload thread
            if not isinstance(error.__cause__, Exception):
                raise
            raise error.__cause__ from error
    except errors.HFValidationError as error:
        raise UserError("invalid repository name", got=where, expected="user/name", fix=str(error)) from error
    except errors.LocalTokenNotFoundError as error:
        raise UserError("no access token for the model hub", where=endpoint, fix=LOGIN) from error
    except UnicodeEncodeError as error:  # the token is the only user text in a header
        raise UserError("the access token for the model hub contains non-ASCII characters", fix=LOGIN) from error
    except errors.HfHubHTTPError as error:
        denied = error.response is not None and error.response.status_code in (401, 403)
        raise UserError(
            "the model hub rejected the upload",
            got=without_password(str(error).splitlines()[0]),
            where=f"{endpoint}/{where}",
            fix=LOGIN if denied else resume,
        ) from error
    except OfflineModeIsEnabled as error:
        fix = "unset HF_HUB_OFFLINE, then rerun"
        raise UserError("HF_HUB_OFFLINE is set, so nothing was sent to the model hub", where=where, fix=fix) from error
    except (OSError, errors.HTTPError) as error:  # type: ignore[attr-defined]  # from the hub's HTTP library
        raise_disk_error(error, Path(tempfile.gettempdir()), 0)
        file = getattr(error, "filename", None)  # only errors about local files have one
        raise UserError(
            "cannot read a file during the upload" if file else "cannot reach the model hub",
            got=without_password(str(error)),
            where=file or endpoint,
            fix="restore the file, then rerun" if file else "check the network connection, then rerun",
        ) from error
