"""Local servers of S3 (moto) and Google Cloud Storage (an emulator), configured only by environment variables, as for a
user."""

import contextlib

import pytest
from commands import ENV
from servers import free_port

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}


@contextlib.contextmanager
def new_clients(files):
    """fsspec keeps its clients, with the settings they were made with: a module's first request would go to the server
    of an earlier module of the same process."""
    files.clear_instance_cache()
    yield files
    files.clear_instance_cache()


@contextlib.contextmanager
def s3_server():
    """A server with an empty `bucket`; yields its client. Commands of other processes use it too."""
    files = pytest.importorskip("s3fs").S3FileSystem
    server_module = pytest.importorskip("moto.server")
    import boto3

    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with new_clients(files), pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        stack.callback(server.stop)
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
            patch.setenv(name, value)
            patch.setitem(ENV, name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        yield client


@contextlib.contextmanager
def gs_server():
    """An emulator with an empty `bucket`; yields its URL."""
    files = pytest.importorskip("gcsfs").GCSFileSystem
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    port = free_port()
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    with new_clients(files), pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        stack.callback(server.stop)
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
