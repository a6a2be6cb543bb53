"""Files and directories that are whole or absent."""

import os

import pytest

from dst_optax import atomic


def write_half(path):
    path.write_text("half")
    raise KeyboardInterrupt


def test_a_file_is_replaced_at_the_end_alone(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with atomic.atomic_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_file_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic.atomic_file(path) as temporary:
        write_half(temporary)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_is_there_at_the_end_alone(tmp_path):
    path = tmp_path / "deep" / "a"
    with atomic.atomic_directory(path) as temporary:
        (temporary / "b").mkdir()
        (temporary / "b" / "x").write_text("1")
        assert not path.exists()
    assert (path / "b" / "x").read_text() == "1"
    with pytest.raises(KeyboardInterrupt), atomic.atomic_directory(path.with_name("c")) as temporary:
        write_half(temporary / "x")
    assert list(path.parent.iterdir()) == [path]


def test_a_directory_does_not_replace_another(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    with pytest.raises(OSError, match="not empty"), atomic.atomic_directory(tmp_path / "a") as temporary:
        (temporary / "y").write_text("2")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_all_of_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, atomic.Path.replace
    monkeypatch.setattr(os, "fsync", lambda f: (events.append(os.readlink(f"/proc/self/fd/{f}")), fsync(f)))
    monkeypatch.setattr(atomic.Path, "replace", lambda a, b: (events.append("renamed"), replace(a, b)))
    with atomic.atomic_directory(tmp_path / "a") as temporary:
        (temporary / "x").write_text("1")
    assert events == [str(temporary / "x"), str(temporary), "renamed", str(tmp_path)]
