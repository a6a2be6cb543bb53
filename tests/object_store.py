"""An object store in memory, in the place of Google's: what ``gs://`` paths of etils reach."""

import pytest


@pytest.fixture
def bucket(monkeypatch):
    """Name of an empty bucket."""
    pytest.importorskip("fsspec")
    gpath = pytest.importorskip("etils.epath.gpath")
    from etils.epath import backend
    from fsspec.implementations.memory import MemoryFileSystem

    class Bucket(MemoryFileSystem):
        """fsspec's memory by Google's names; flat, as a store of objects is."""

        store, pseudo_dirs = {}, [""]
        cachable = False

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(str(path).removeprefix("gs://"))

        def glob(self, path, **kwargs):
            return [found.removeprefix("/") for found in super().glob(path, **kwargs)]

    store = backend._FileSystemSpecBackend()
    monkeypatch.setattr(store, "fs", lambda path: Bucket())
    choose = property(lambda path: store if path._uri_scheme else backend.os_backend)
    monkeypatch.setattr(gpath.PosixGPath, "_backend", choose)
    return "gs://bucket"
