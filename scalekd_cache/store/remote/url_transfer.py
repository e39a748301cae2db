"""Transfers to and from URLs through fsspec, with a list of allowed schemes, bounded retries, and actionable errors.

In: a URL and, for an upload, a file. Out: a file, a length, a listing.
Invariant: only the schemes listed here are opened, and no shell command is run; size and time are limited; redirects
may lead only to the same host or to hosts that the user allowed; errors give the URL, the status and the number of
attempts but no passwords. fsspec and its implementations are imported when a URL is opened, and an instance never
crosses a fork (its event loop would hang).
"""

import functools
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

from scalekd_cache.config.remote import RemoteConfig
from scalekd_cache.errors import UserError, counted, import_optional
from scalekd_cache.store.checked_files import PIECE_BYTES, open_file, read_at
from scalekd_cache.store.durable_files import is_disk_full

SCHEMES = {"http": "remote", "https": "remote", "s3": "remote", "gs": "gcs", "hf": "remote"}
"""URL schemes for remote caches, with the extra in setup.cfg that installs their packages; `file` is a local folder."""
PACKAGES = {
    "http": ("aiohttp",),
    "https": ("aiohttp",),
    "s3": ("s3fs", "botocore", "aiohttp"),
    "gs": ("gcsfs", "aiohttp"),
    "hf": ("huggingface_hub",),
}
"""The packages that fsspec needs for each scheme."""
HUB_PLACE = re.compile(r"hf://(datasets/)?[^/]+/[^/]+(/.*)?")
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
SECRET = re.compile("TOKEN|SECRET|PASSWORD|CREDENTIAL|_KEY")
"""Names of environment variables whose values are never printed."""
SECRET_LENGTH = 8
"""Minimum length of a secret. Shorter values are not hidden, because that would also hide ordinary words."""
MAX_WAIT_S = 30.0
RETRY_STATUS = {408, 425, 429}
"""Client errors that are retried."""
FIXES = {
    401: "provide credentials (docs/REMOTE.md)",
    403: "provide credentials with read access (docs/REMOTE.md); some servers return 403 for a missing file",
    404: "check the URL; if it is correct, the cache at this URL is incomplete: copy it again",
}
WRITE_FIXES = {
    401: "provide credentials with write access (docs/REMOTE.md)",
    403: "provide credentials with write access to this bucket (docs/REMOTE.md)",
    404: "check the bucket name; the bucket must already exist",
}
T = TypeVar("T")


class TransferError(OSError):
    """The downloaded bytes differ from the expected bytes."""


class RemoteNotFoundError(UserError):
    """The server reports that the file does not exist."""


class RemoteDeniedError(UserError):
    """The server denies access to the file, or hides the fact that it does not exist."""


def is_url(place: str) -> bool:
    """Whether a string is a URL. Raises `UserError` if its scheme is not allowed."""
    found = SCHEME.match(place)
    if found is None:
        return False
    scheme = found[0][:-1].lower()
    url = urlsplit(place)
    if scheme == "hf" and not HUB_PLACE.fullmatch(place):
        raise UserError(
            "this is not the URL of a repository on the Hugging Face Hub",
            got=without_password(place),
            expected="hf://datasets/USER/NAME",
        )
    if scheme not in {"file", *SCHEMES} or not place[len(scheme) :].startswith("://") or "::" in place:
        raise UserError(
            "unsupported URL",
            got=without_password(place),
            expected=", ".join(f"{name}://" for name in sorted({"file", *SCHEMES})) + ", or a folder",
            fix="for a folder with a colon in its name, put ./ before the name",
        )
    if url.query or url.fragment or (scheme == "file" and url.netloc not in ("", "localhost")):
        raise UserError(
            "a cache URL cannot have a query, a fragment, or a host after file://",
            got=without_password(place),
            expected=f"{scheme}://{'' if scheme == 'file' else 'bucket' if scheme in ('s3', 'gs') else 'host'}/folder",
        )
    return True


def without_password(text: str) -> str:
    """Hide user names, passwords, queries and secrets from the environment in a URL, or in text that contains URLs, for
    messages."""
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= SECRET_LENGTH:
            text = text.replace(value, "***")
    text = re.sub(r"://[^/@\s]*@", "://***@", text)
    return re.sub(r"(://[^\s?#'\"]*[?#])[^\s'\"]*", r"\1***", text)


def download(
    url: str,
    target: Path,
    limit_bytes: int,
    config: RemoteConfig,
    check: Callable[[], None] | None,
    received: Callable[[int], None] | None = None,
) -> None:
    """Download a URL to `target`.

    Args:
        url: the file.
        target: where the file is written; an existing file is replaced.
        limit_bytes: maximum size.
        config: number of attempts, and timeouts.
        check: raises `TransferError` for wrong bytes; None for a file with an unknown hash, which must not be
            redirected to a different host.
        received: called with the number of bytes in each piece; an exception ends the transfer.

    Raises:
        UserError: the last attempt failed; `RemoteNotFoundError` if the server does not have the file.
    """

    def once() -> None:
        target.unlink(missing_ok=True)
        system, callback = _filesystem(url, config), _bounded(limit_bytes, config, received)
        if url.startswith("hf:"):  # one request; `get_file` would list the folder and read the file in blocks
            with system.open(url, "rb", block_size=0) as remote, target.open("wb") as file:
                while piece := remote.read(PIECE_BYTES):
                    file.write(piece)
                    callback.relative_update(len(piece))
        else:
            options = _request_options(url, config.redirect_hosts if check else "")
            system.get_file(url, str(target), callback=callback, **options)
        if check:
            check()

    _attempts(url, config, once)


def read_ranges(url: str, spans: Sequence[tuple[int, int]], config: RemoteConfig) -> list[bytes]:
    """The bytes of each span of a file, from start to end.

    Raises:
        UserError: as for `download`; also if the server does not support range requests.
    """

    def once() -> list[bytes]:
        starts, ends = [start for start, _ in spans], [end for _, end in spans]
        options = _request_options(url, config.redirect_hosts)
        found = _filesystem(url, config).cat_ranges([url] * len(spans), starts, ends, on_error="raise", **options)
        for data, (start, end) in zip(found, spans, strict=True):
            if len(data) > end - start:
                raise UserError(
                    "the server does not support range requests, so pixels cannot be left out",
                    where=without_password(url),
                    fix="pull with pixels (remove --without-pixels)",
                )
            if len(data) < end - start:
                raise TransferError(f"received {len(data):,} bytes of a {end - start:,}-byte range")
        return list(found)

    return _attempts(url, config, once)


def remote_size(url: str, config: RemoteConfig) -> int | None:
    """The length reported by the server, or None if it reports none. Raises the same errors as `download`."""

    def once() -> Any:
        system = _filesystem(url, config)
        system.invalidate_cache()  # cached listings of the hub, S3 and GS
        return system.info(url, **_request_options(url, config.redirect_hosts)).get("size")

    size = _attempts(url, config, once)
    return size if isinstance(size, int) else None


def _filesystem(url: str, config: RemoteConfig) -> Any:
    """The fsspec file system for a URL. fsspec caches instances per process and thread, so none crosses a fork."""
    scheme = urlsplit(url).scheme
    for name in PACKAGES[scheme]:
        _package(name, scheme)
    system = _package("fsspec", scheme).filesystem(scheme, **_options(scheme, config))
    if hasattr(system, "retries"):
        system.retries = 1  # this module handles retries; do not multiply attempts
    return system


def _package(module: str, scheme: str) -> Any:
    """Import a package that a scheme needs; raises UserError if it is missing or broken."""
    return import_optional(module, f"{scheme}:// URLs need {module.partition('.')[0]}", SCHEMES[scheme])


def _options(scheme: str, config: RemoteConfig) -> dict[str, Any]:
    """Timeouts in the form that each implementation expects, with its own retries disabled."""
    if scheme in ("http", "https"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=config.total_s, sock_connect=config.timeout_s, sock_read=config.timeout_s)
        return {"client_kwargs": {"timeout": timeout, "trust_env": True, "trace_configs": _redirect_hooks()}}
    if scheme == "s3":
        seconds = {"connect_timeout": config.timeout_s, "read_timeout": config.timeout_s}
        return {"config_kwargs": {**seconds, "retries": {"max_attempts": 0}}, "max_concurrency": 1}
    return {"requests_timeout": config.timeout_s}


def _request_options(url: str, redirect_hosts: str) -> dict[str, Any]:
    """Options for one HTTP request: the hosts to which a redirect may lead."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        return {}
    hosts = {parts.netloc.rpartition("@")[2].lower(), *filter(None, redirect_hosts.lower().split(","))}
    return {"trace_request_ctx": (parts.scheme, hosts)}


@functools.cache
def _redirect_hooks() -> list[Any]:
    """aiohttp hooks that reject all other redirects. Always the same object, because fsspec caches instances by their
    options."""
    from aiohttp import TraceConfig

    async def check(session: Any, context: Any, facts: Any) -> None:
        scheme, hosts = context.trace_request_ctx
        answer = facts.response
        target = urljoin(str(answer.url), answer.headers.get("Location") or answer.headers.get("URI") or "")
        found = urlsplit(target)
        if found.scheme != scheme or found.netloc.rpartition("@")[2].lower() not in hosts:
            raise UserError(
                "the server redirects to a URL that is not allowed",
                got=without_password(target),
                expected=f"{scheme}:// with one of these hosts: {', '.join(sorted(hosts))}",
                where=without_password(str(answer.url)),
                fix="use the cache's final URL; to allow a host that you trust, set remote.redirect_hosts=host "
                "(redirects of the manifest to a different host are always rejected)",
            )

    hook = TraceConfig()
    hook.on_request_redirect.append(check)
    return [hook]


def copy_file(path: Path, target: Path, limit_bytes: int, received: Callable[[int], None] | None = None) -> None:
    """Copy a local file to `target`, which is replaced; arguments as for `download`.

    Raises:
        FileNotFoundError: it does not exist.
        TransferError: it is larger than the limit.
        UserError: it is not a regular file or cannot be read.
    """
    copied = 0
    with open_file(path) as file, target.open("wb") as copy:
        while piece := read_at(file.fileno(), PIECE_BYTES, copied, path):
            copied += len(piece)
            if copied > limit_bytes:
                raise TransferError(f"larger than the expected {limit_bytes:,} bytes")
            if received is not None:
                received(len(piece))
            copy.write(piece)


def _bounded(limit_bytes: int, config: RemoteConfig, received: Callable[[int], None] | None = None) -> Any:
    """An fsspec callback that aborts transfers that are too large, too slow or too long."""
    from fsspec.callbacks import Callback

    started = time.monotonic()

    class Bounded(Callback):  # type: ignore[misc, unused-ignore]
        def relative_update(self, inc: int = 1) -> None:
            super().relative_update(inc)
            if received is not None:
                received(inc)
            if self.value > limit_bytes:
                raise TransferError(f"received more than the expected {limit_bytes:,} bytes")
            passed_s = time.monotonic() - started
            if passed_s > config.total_s or (passed_s > config.timeout_s and self.value < config.least_rate * passed_s):
                limits = f"remote.least_rate={config.least_rate:g}, remote.total_s={config.total_s:g}"
                raise TimeoutError(f"received only {self.value:,} bytes in {passed_s:.0f} s ({limits})")

    return Bounded()


def _attempts(url: str, config: RemoteConfig, once: Callable[[], T], verb: str = "download") -> T:
    """Retry with exponential backoff; errors that retries cannot fix are raised immediately."""
    failures = _failures(urlsplit(url).scheme)
    number = 1
    while True:
        try:
            return once()
        except failures as error:
            if is_disk_full(error):
                raise
            for refused in _chain(error):
                if isinstance(refused, UserError):
                    raise refused from None
            status = _status(error)
            if number >= config.attempts or _is_final(error, status):
                raise _failed(url, error, status, number, config, verb) from error
        wait = min(MAX_WAIT_S, config.backoff_s * 2 ** (number - 1))
        time.sleep(wait * random.uniform(0.5, 1))  # jitter, so that processes do not retry at the same time
        number += 1


def _failures(scheme: str) -> tuple[type[Exception], ...]:
    """The exceptions that transfers raise for network or server failures."""
    errors: list[type[Exception]] = [OSError, TimeoutError]
    if scheme == "hf":
        return (*errors, _package("huggingface_hub.errors", scheme).HTTPError)
    errors.append(_package("aiohttp", scheme).ClientError)
    if scheme == "s3":
        boto = _package("botocore.exceptions", scheme)
        errors += [boto.BotoCoreError, boto.ClientError]
    return tuple(errors)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: Exception) -> int | None:
    """The HTTP status in an error, if the implementation reports one."""
    for one in _chain(error):
        response = getattr(one, "response", None)
        metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        # aiohttp's protocol errors also have a `code`: 400 for a truncated body, which is not the server's status
        code = getattr(one, "code", None) if type(one).__module__.startswith("gcsfs") else None
        found = (
            getattr(one, "status", None),
            code,
            metadata.get("HTTPStatusCode"),
            getattr(response, "status_code", None),
        )
        for status in found:
            if isinstance(status, int) and status >= 400:
                return status
    if isinstance(error, FileNotFoundError) and error.__cause__ is None:
        return 404
    return 403 if isinstance(error, PermissionError) else None


def _is_final(error: Exception, status: int | None) -> bool:
    if status is not None:
        return 400 <= status < 500 and status not in RETRY_STATUS
    return type(error).__name__ in ("InvalidURL", "NoCredentialsError", "ParamValidationError", "OfflineModeIsEnabled")


def _failed(
    url: str, error: Exception, status: int | None, attempts: int, config: RemoteConfig, verb: str
) -> UserError:
    kind = {401: RemoteDeniedError, 403: RemoteDeniedError, 404: RemoteNotFoundError}.get(status or 0, UserError)
    root = error
    while isinstance(root.__cause__, Exception):  # some implementations report every error as "not found"
        root = root.__cause__
    reason = f"{type(root).__name__}: {without_password((str(root).splitlines() or [''])[0])}".rstrip(": ")
    fixes = FIXES if verb == "download" else WRITE_FIXES
    if isinstance(error, TransferError) and verb == "upload":
        fix = "rerun; if this happens again, check the server"
    elif isinstance(error, TransferError):
        fix = "the file does not match this cache's manifest: copy the cache again (rsync, aws s3 sync)"
    elif type(error).__name__ == "NoCredentialsError":
        fix = fixes[401]
    else:
        fix = fixes.get(
            status or 0,
            f"check that the server is running; increase remote.attempts={config.attempts}"
            f" or remote.timeout_s={config.timeout_s:g}",
        )
    return kind(
        f"cannot {verb} a file" if verb != "list" else "cannot list the files at a URL",
        got=f"{f'status {status}, ' if status else ''}{reason} ({attempts} of {counted(config.attempts, 'attempt')})",
        where=without_password(url),
        fix=fix,
    )


def upload(path: Path, url: str, config: RemoteConfig) -> None:
    """Upload a file and check its length against the length that the server then reports.

    Raises:
        UserError: the last attempt failed.
    """

    def once() -> None:
        system = _filesystem(url, config)
        system.put_file(str(path), url)
        system.invalidate_cache()
        size, sent = system.info(url)["size"], path.stat().st_size
        if size != sent:
            raise TransferError(f"the server has {size:,} bytes, but {sent:,} were sent")

    _attempts(url, config, once, "upload")


def sizes_below(url: str, config: RemoteConfig) -> dict[str, int]:
    """Sizes in bytes of all files below a bucket folder, keyed by path relative to it. The empty objects that a console
    creates for folders do not count. Raises the same errors as `upload`."""

    def once() -> dict[str, int]:
        system = _filesystem(url, config)
        system.invalidate_cache()
        start = str(system._strip_protocol(url)).rstrip("/") + "/"
        found = {name: facts for name, facts in system.find(start, detail=True).items() if name.startswith(start)}
        return {name.removeprefix(start): facts["size"] for name, facts in found.items() if not name.endswith("/")}

    return _attempts(url, config, once, "list")
