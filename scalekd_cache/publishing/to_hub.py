"""Publishes to a dataset repository on the model hub through huggingface_hub.

In: files. Out: commits. Invariant: all files in a unit are in one commit, and the files that make the cache readable
are in the last commit.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from scalekd_cache.errors import UserError, counted
from scalekd_cache.models.hub import hub_answers, upload_errors
from scalekd_cache.publishing.destination import KINDS, Found, Parcel, Sending, check_file
from scalekd_cache.store.checked_files import JSON_BYTES, read_file

COMMIT_BYTES, COMMIT_FILES = 4_000_000_000, 500
"""A commit is sent once it reaches this many bytes or files. Its temporary files need that much disk space."""
RESUME = "rerun; files that are already uploaded are not sent again"


def hub_repository(url: str) -> tuple[str, str]:
    """Split a URL into the repository, USER/NAME, and the folder in it (empty: the top level).

    Raises:
        UserError: the URL does not name a dataset repository.
    """
    kind, *parts = url.removeprefix("hf://").split("/")
    if kind != "datasets" or len(parts) < 2:
        kinds = ("datasets", "models", "spaces")
        hint = "/".join(parts[:2] if kind in kinds else [kind, *parts[:1]])
        example = f"hf://datasets/{hint}" if hint.count("/") == 1 else KINDS["hf"]
        raise UserError(f"--to {url} is not a dataset repository on the hub: use {example}")
    return "/".join(parts[:2]), "/".join(parts[2:])


class HubPlace:
    """A dataset repository, or a folder in one; it may not exist yet."""

    def __init__(self, repo: str, folder: str, *, private: bool, connections: int) -> None:
        self.repo, self.folder, self.private, self.connections = repo, folder, private, connections
        self._api = HfApi()
        self._exists = False

    @property
    def shown(self) -> str:
        """The URL."""
        return "/".join(filter(None, ("hf://datasets", self.repo, self.folder)))

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Does nothing, because the hub has no locks."""
        return contextlib.nullcontext()

    def listing(self) -> dict[str, Found]:
        """The existing files."""
        found = {}
        if not constants.is_offline_mode() and not hub_answers():  # otherwise, huggingface_hub retries for a minute
            raise UserError(
                "cannot reach the model hub", where=self._api.endpoint, fix="check the network connection, then rerun"
            )
        with self._errors(), contextlib.suppress(RepositoryNotFoundError, EntryNotFoundError):
            entries = self._api.list_repo_tree(
                self.repo, path_in_repo=self.folder or None, recursive=True, repo_type="dataset"
            )
            for entry in entries:
                if isinstance(entry, RepoFile):
                    name = entry.path.removeprefix(f"{self.folder}/" if self.folder else "")
                    sha256 = entry.lfs.sha256 if entry.lfs else None
                    found[name] = Found(entry.size, sha256, None if sha256 else entry.blob_id)
        return found

    def read(self, name: str) -> bytes | None:
        """The contents of a small file; None if it does not exist."""
        path = "/".join(filter(None, (self.folder, name)))
        with self._errors(), tempfile.TemporaryDirectory(prefix="scalekd-publish-") as folder:
            try:
                infos = self._api.get_paths_info(self.repo, path, repo_type="dataset")
                if not infos:
                    return None
                copy = self._api.hf_hub_download(self.repo, path, repo_type="dataset", local_dir=folder)
            except (RepositoryNotFoundError, EntryNotFoundError):
                return None
            return read_file(Path(copy), name, JSON_BYTES)
        raise AssertionError

    def send_units(self, parcels: Sequence[Parcel], done: Callable[[int], None]) -> None:
        """Send units, several per commit; the files in a commit are sent in parallel."""
        sent, count = 0, len(parcels)
        while sent < count:
            with contextlib.ExitStack() as made:
                files: list[Sending] = []
                sizes: list[int] = []
                while sent + len(sizes) < count and len(files) < COMMIT_FILES and sum(sizes) < COMMIT_BYTES:
                    unit = made.enter_context(parcels[sent + len(sizes)]())
                    files += unit
                    sizes.append(sum(file.fact.bytes for file in unit))
                last = sent + len(sizes)
                self._commit(files, f"Units {sent + 1} to {last} of {counted(count, 'unit')}")
                sent = last
            for size in sizes:
                done(size)

    def send(self, files: Sequence[Sending]) -> None:
        """Send files in one commit."""
        self._commit(files, f"Cache: {', '.join(file.name for file in files)}"[:200])

    def _commit(self, files: Sequence[Sending], message: str) -> None:
        if not files:
            return
        for file in files:
            check_file(file)
        with self._errors(), _without_bars():
            if not self._exists:
                self._api.create_repo(self.repo, repo_type="dataset", private=self.private, exist_ok=True)
                self._exists = True
            start = f"{self.folder}/" if self.folder else ""
            self._api.create_commit(
                self.repo,
                [CommitOperationAdd(start + file.name, str(file.path)) for file in files],
                commit_message=message,
                repo_type="dataset",
                num_threads=self.connections,
            )

    def _errors(self) -> contextlib.AbstractContextManager[None]:
        return upload_errors(self._api.endpoint, f"datasets/{self.repo}", RESUME)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Disable huggingface_hub's per-file progress bars, because a single bar shows the whole transfer."""
    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()
