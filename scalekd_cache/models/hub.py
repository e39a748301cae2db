"""Checks whether the hub of pretrained models can be reached, so that offline machines fail within seconds.

In: huggingface_hub's settings. Out: a context in which downloads work or fail at once.
Invariant: files in the hub's local cache are found either way. huggingface_hub alone retries for about a minute.
"""

import contextlib
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

TIMEOUT_S = 3.0
"""Timeout in seconds for the first reply of the hub, including name lookup."""


def hub_answers() -> bool:
    """Whether the hub replies within `TIMEOUT_S`; uses the proxies of the environment."""
    answers: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def ask() -> None:
        try:
            request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
            with urllib.request.urlopen(request, timeout=TIMEOUT_S):
                answers.put(True)
        except urllib.error.HTTPError:  # an answer all the same
            answers.put(True)
        except (OSError, ValueError):
            answers.put(False)

    threading.Thread(target=ask, daemon=True).start()  # a name lookup has no timeout of its own
    try:
        return answers.get(timeout=TIMEOUT_S)
    except queue.Empty:
        return False


@contextlib.contextmanager
def hub_or_cache() -> Iterator[None]:
    """A context in which downloads use only the local cache if the hub does not reply.

    Raises:
        ConnectionError: the hub does not reply, and the requested file is not in the local cache.
    """
    if not constants.is_offline_mode() and hub_answers():
        yield
        return
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, urllib.error.URLError) as error:
        raise ConnectionError(f"no connection to {constants.ENDPOINT}, and not in the local cache") from error
    finally:
        constants.HF_HUB_OFFLINE = before
