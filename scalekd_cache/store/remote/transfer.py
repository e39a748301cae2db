"""Bytes from a URL, by fsspec: which URLs are allowed, bounded retries, and errors that say what to do.

In: a URL. Out: a file beside the local copies, or a length. Invariant: only the schemes listed here are ever opened,
never a command; never more bytes than asked for, nor longer; a redirect leads to the same host or one that the user
named; an error names URL, status and attempts. fsspec and its
implementations are imported when a URL is opened, and an instance never crosses a fork (its event loop would hang).
"""

import functools
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

from scalekd_cache.config.remote import RemoteConfig
from scalekd_cache.errors import UserError
from scalekd_cache.store.durable_files import is_disk_full
from scalekd_cache.versions import import_optional

SCHEMES = {"http": "remote", "https": "remote", "s3": "remote", "gs": "gcs"}
"""Schemes of remote caches, and the extra of setup.cfg that brings what they need; `file` is a folder."""
PACKAGES = {
    "http": ("aiohttp",),
    "https": ("aiohttp",),
    "s3": ("s3fs", "botocore", "aiohttp"),
    "gs": ("gcsfs", "aiohttp"),
}
"""What fsspec needs for each scheme."""
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
MAX_WAIT_S = 30.0
PASSING_STATUS = {408, 425, 429}
"""Client errors that may be gone a moment later."""
FIXES = {
    401: "give credentials (docs/REMOTE.md)",
    403: "give credentials that may read it (docs/REMOTE.md); some stores answer 403 for a file that is not there",
    404: "check the URL (CACHE=...); if it is right, the cache there is not whole: copy it again",
}
T = TypeVar("T")


class TransferError(OSError):
    """What arrived is not what was asked for."""


class NotThereError(UserError):
    """The server says that there is no such file."""


def is_url(place: str) -> bool:
    """Whether a place is meant as a URL; UserError for one whose scheme is not allowed."""
    found = SCHEME.match(place)
    if found is None:
        return False
    scheme = found[0][:-1].lower()
    url = urlsplit(place)
    if scheme not in {"file", *SCHEMES} or not place[len(scheme) :].startswith("://") or "::" in place:
        raise UserError(
            "this kind of URL is not opened",
            got=shown(place),
            expected=", ".join(f"{name}://" for name in sorted({"file", *SCHEMES})) + ", or a folder",
            fix="for a folder with a colon in its name write ./ before it",
        )
    if url.query or url.fragment or (scheme == "file" and url.netloc not in ("", "localhost")):
        raise UserError(
            "a cache's URL cannot have a query, a fragment or a file host",
            got=shown(place),
            expected="scheme://place/folder",
        )
    return True


def shown(url: str) -> str:
    """A URL without its password, for messages."""
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", url)


def download(url: str, target: Path, limit_bytes: int, config: RemoteConfig, check: Callable[[], None] | None) -> None:
    """Write what a URL holds to `target`, at most `limit_bytes`.

    Args:
        url: where it is.
        target: a file, replaced.
        limit_bytes: its length at most.
        config: attempts and times.
        check: raises TransferError for wrong bytes; None when nobody knows what they must be: such a file comes from
            the URL's own host only.

    Raises:
        UserError: after the last attempt; NotThereError when the server knows no such file.
    """

    def once() -> None:
        target.unlink(missing_ok=True)
        options = _request_options(url, config.redirect_hosts if check else "")
        _filesystem(url, config).get_file(url, str(target), callback=_bounded(limit_bytes, config), **options)
        if check:
            check()

    _attempts(url, config, once)


def remote_size(url: str, config: RemoteConfig) -> int | None:
    """Length that the server gives; None when it gives none. Errors as `download` has them."""

    def once() -> Any:
        return _filesystem(url, config).info(url, **_request_options(url, config.redirect_hosts)).get("size")

    size = _attempts(url, config, once)
    return size if isinstance(size, int) else None


def _filesystem(url: str, config: RemoteConfig) -> Any:
    """The fsspec implementation of a URL. fsspec keeps instances by process and thread, so none crosses a fork."""
    scheme = urlsplit(url).scheme
    for name in PACKAGES[scheme]:
        _package(name, scheme)
    system = _package("fsspec", scheme).filesystem(scheme, **_options(scheme, config))
    if hasattr(system, "retries"):
        system.retries = 1  # attempts are counted here, not multiplied
    return system


def _package(module: str, scheme: str) -> Any:
    """A module that reading a scheme needs; UserError when it is missing or broken."""
    return import_optional(module, f"{scheme}:// URLs need {module.partition('.')[0]}", SCHEMES[scheme])


def _options(scheme: str, config: RemoteConfig) -> dict[str, Any]:
    """Time-outs where each implementation has them; no attempts but ours."""
    if scheme in ("http", "https"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=config.total_s, sock_connect=config.timeout_s, sock_read=config.timeout_s)
        return {"client_kwargs": {"timeout": timeout, "trust_env": True, "trace_configs": _redirects_checked()}}
    if scheme == "s3":
        seconds = {"connect_timeout": config.timeout_s, "read_timeout": config.timeout_s}
        return {"config_kwargs": {**seconds, "retries": {"max_attempts": 0}}, "max_concurrency": 1}
    return {"requests_timeout": config.timeout_s}


def _request_options(url: str, redirect_hosts: str) -> dict[str, Any]:
    """What one request of the HTTP implementation is given: where a redirect may lead."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        return {}
    hosts = {parts.netloc.rpartition("@")[2].lower(), *filter(None, redirect_hosts.lower().split(","))}
    return {"trace_request_ctx": (parts.scheme, hosts)}


@functools.cache
def _redirects_checked() -> list[Any]:
    """aiohttp's hook that refuses redirects; one object, because fsspec keeps its instances by their options."""
    from aiohttp import TraceConfig

    async def check(session: Any, context: Any, facts: Any) -> None:
        scheme, hosts = context.trace_request_ctx
        answer = facts.response
        target = urljoin(str(answer.url), answer.headers.get("Location") or answer.headers.get("URI") or "")
        found = urlsplit(target)
        if found.scheme != scheme or found.netloc.rpartition("@")[2].lower() not in hosts:
            raise UserError(
                "the server redirects to another place",
                got=shown(target),
                expected=f"{scheme}:// and one of {', '.join(sorted(hosts))}",
                where=shown(str(answer.url)),
                fix="give the cache's final URL; for another host that you trust set remote.redirect_hosts=host "
                "(the manifest always comes from the host of the URL)",
            )

    hook = TraceConfig()
    hook.on_request_redirect.append(check)
    return [hook]


def _bounded(limit_bytes: int, config: RemoteConfig) -> Any:
    """An fsspec callback that ends a transfer of more than it should have, or of next to nothing a second."""
    from fsspec.callbacks import Callback

    begun = time.monotonic()

    class Bounded(Callback):  # type: ignore[misc, unused-ignore]
        def relative_update(self, inc: int = 1) -> None:
            super().relative_update(inc)
            if self.value > limit_bytes:
                raise TransferError(f"more than the expected {limit_bytes:,} bytes arrived")
            passed_s = time.monotonic() - begun
            if passed_s > config.total_s or (passed_s > config.timeout_s and self.value < config.least_rate * passed_s):
                raise TimeoutError(f"only {self.value:,} bytes arrived in {passed_s:.0f} s (remote.least_rate="
                                   f"{config.least_rate:g}, remote.total_s={config.total_s:g})")  # fmt: skip

    return Bounded()


def _attempts(url: str, config: RemoteConfig, once: Callable[[], T]) -> T:
    """Try, wait twice as long each time, try again; errors that will not pass are raised at once."""
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
                raise _failed(url, error, status, number, config) from error
        wait = min(MAX_WAIT_S, config.backoff_s * 2 ** (number - 1))
        time.sleep(wait * random.uniform(0.5, 1))  # processes that failed together do not come back together
        number += 1


def _failures(scheme: str) -> tuple[type[Exception], ...]:
    """What a transfer may raise when the network or the server is the reason."""
    errors = [OSError, TimeoutError, _package("aiohttp", scheme).ClientError]
    if scheme == "s3":
        boto = _package("botocore.exceptions", scheme)
        errors += [boto.BotoCoreError, boto.ClientError]
    return tuple(errors)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: Exception) -> int | None:
    """The HTTP status behind an error, as far as the implementations tell."""
    for one in _chain(error):
        response = getattr(one, "response", None)
        metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        # aiohttp's protocol errors have a `code` too: 400 for a body that was cut short, which no server has sent
        code = getattr(one, "code", None) if type(one).__module__.startswith("gcsfs") else None
        for status in (getattr(one, "status", None), code, metadata.get("HTTPStatusCode")):
            if isinstance(status, int) and status >= 400:
                return status
    if isinstance(error, FileNotFoundError) and error.__cause__ is None:
        return 404
    return 403 if isinstance(error, PermissionError) else None


def _is_final(error: Exception, status: int | None) -> bool:
    if status is not None:
        return 400 <= status < 500 and status not in PASSING_STATUS
    return type(error).__name__ in ("InvalidURL", "NoCredentialsError", "ParamValidationError")


def _failed(url: str, error: Exception, status: int | None, attempts: int, config: RemoteConfig) -> UserError:
    kind = NotThereError if status == 404 else UserError
    root = error
    while isinstance(root.__cause__, Exception):  # some implementations call everything "not found"
        root = root.__cause__
    reason = f"{type(root).__name__}: {shown(str(root))}".rstrip(": ")
    if isinstance(error, TransferError):
        fix = "the file there is not the one of this cache's manifest: copy the cache again (rsync, aws s3 sync)"
    elif type(error).__name__ == "NoCredentialsError":
        fix = FIXES[401]
    else:
        fix = FIXES.get(
            status or 0,
            f"see whether the server is up; allow more with remote.attempts={config.attempts}"
            f" and remote.timeout_s={config.timeout_s:g}",
        )
    return kind(
        "a file cannot be fetched",
        got=f"{f'status {status}, ' if status else ''}{reason} ({attempts} of {config.attempts} attempts)",
        where=shown(url),
        fix=fix,
    )
