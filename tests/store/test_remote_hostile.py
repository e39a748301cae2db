"""Malicious servers: one byte at a time, redirects to other hosts."""

import pytest
from remote_cases import ALL, config
from servers import faulty_server
from store_cases import expected, write_cache

from scalekd_cache.errors import UserError
from scalekd_cache.store.reader import Cache

TAR = "g000-r00001/v0001.tar"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_cache(tmp_path_factory.mktemp("tar"), "webdataset")


@pytest.fixture
def server(folder):
    with faulty_server(folder) as server:
        yield server


@pytest.fixture
def other(folder):
    """The same files on another host; another port counts as another host."""
    with faulty_server(folder) as server:
        yield server


@pytest.mark.parametrize("end", ["manifest.json", "unit.json", TAR])
@pytest.mark.parametrize("bound", [{"least_rate": 1000}, {"total_s": 0.6}], ids=["rate", "total"])
def test_bytes_one_at_a_time_end(server, tmp_path, end, bound):
    """Each byte arrives before the timeout, but the whole file would take hours."""
    server.fail(end, "drip")
    with pytest.raises(UserError, match=r"cannot download a file(.|\n)*(least_rate|[Tt]imeout)") as caught:
        Cache.open(server.url, config(tmp_path, attempts=1, **bound)).read(ALL, 1)
    assert end in str(caught.value)


@pytest.mark.parametrize("end", ["manifest.json", "unit.json", TAR])
@pytest.mark.parametrize(
    "target", ["http://169.254.169.254/secret", "https://127.0.0.1/x", "ftp://127.0.0.1/x", "file:///etc/passwd"]
)
def test_a_redirect_elsewhere_is_refused_at_once(server, tmp_path, end, target):
    server.fail(end, target)
    with pytest.raises(UserError, match="redirects to a URL that is not allowed") as caught:
        Cache.open(server.url, config(tmp_path)).read(ALL, 1)
    assert target.split("/")[2] in str(caught.value)
    assert server.gets(end) == 1  # no second attempt


def test_a_redirect_on_the_same_host_is_followed(server, folder, tmp_path):
    server.fail(TAR, f"{server.url}/units/{TAR}?again", 1)
    server.fail("manifest.json", "/manifest.json?again", 1)
    assert Cache.open(server.url, config(tmp_path)).read(ALL, 1) == expected(1)


def test_hosts_that_the_user_named_may_be_redirected_to(server, other, tmp_path):
    server.fail(TAR, f"{other.url}/units/{TAR}")
    named = config(tmp_path, redirect_hosts=f"elsewhere.org,{other.url[7:]}")
    assert Cache.open(server.url, named).read(ALL, 1) == expected(1)
    assert other.gets(TAR) == 1
    server.fail("manifest.json", f"{other.url}/manifest.json")  # the manifest, which all other checks depend on
    with pytest.raises(UserError, match="redirects to a URL that is not allowed"):
        Cache.open(server.url, named)
