"""flash-attn-4 keeps its compiled kernels on disk, in a folder of the user's own; here it is a stand-in."""

from __future__ import annotations

import os
import sys

import pytest

from qwen_longctx.ops import fa4

PACKAGE = """
import os
flash_attn_func = {name: os.environ.get(name) for name in %r}
"""


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """What the package reads from the environment while it is imported, for a home folder."""
    package = tmp_path / "site" / "flash_attn" / "cute"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(PACKAGE % ((fa4._SWITCH, fa4._PLACE),))
    (package / "block_sparsity.py").write_text("BlockSparseTensorsTorch = None")
    monkeypatch.syspath_prepend(tmp_path / "site")
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    for name in (fa4._SWITCH, fa4._PLACE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    fa4._functions.cache_clear()

    def read():
        before = dict(os.environ)
        seen = fa4._functions()[0]
        assert dict(os.environ) == before
        return seen[fa4._SWITCH], seen[fa4._PLACE]

    yield read
    fa4._functions.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        del sys.modules[name]


def test_kernels_are_kept_in_a_folder_of_the_user(imported, tmp_path):
    folder = tmp_path / ".cache" / "qwen_longctx" / "flash_attn_4"
    assert imported() == ("1", str(folder))
    assert folder.stat().st_mode & 0o777 == 0o700 and not list(folder.iterdir())


def test_the_cache_folder_of_the_user_is_followed(imported, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    assert imported() == ("1", str(tmp_path / "own" / "qwen_longctx" / "flash_attn_4"))


def test_what_the_user_says_holds(imported, tmp_path, monkeypatch):
    monkeypatch.setenv(fa4._SWITCH, "0")
    assert imported() == ("0", None)
    assert not (tmp_path / ".cache").exists()


def test_a_folder_of_the_user_holds(imported, monkeypatch):
    monkeypatch.setenv(fa4._PLACE, "/elsewhere")
    assert imported() == ("1", "/elsewhere")


def test_nothing_is_kept_where_nothing_can_be_written(imported, tmp_path):
    (tmp_path / ".cache").write_text("a file")
    assert imported() == (None, None)


def test_nothing_is_kept_where_no_file_can_be_locked(imported, monkeypatch):
    def refuse(*_):
        raise OSError("no locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert imported() == (None, None)
