"""Whatever happens while a file is saved: nothing is replaced, nothing is lost, and what lies there is whole."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dode_nodes.errors import NameTaken, TableError
from dode_nodes.tables import publish

CONTENT = bytes(range(256)) * 40
CALLS = ("listdir", "open", "write", "fsync", "close", "link", "unlink", "replace", "lstat")
"""Of the system, that a save makes."""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A file that is there already."""
    path = tmp_path / "a.safetensors"
    publish.publish(path, CONTENT, overwrite=False)
    return path


def test_a_file_is_written_and_nothing_else(saved):
    assert saved.read_bytes() == CONTENT
    assert os.listdir(saved.parent) == [saved.name]


def test_nothing_is_replaced_unasked(saved):
    with pytest.raises(
        NameTaken, match=r"a\.safetensors: exists already and is not overwritten. Choose another name"
    ):
        publish.publish(saved, b"new", overwrite=False)
    assert saved.read_bytes() == CONTENT
    publish.publish(saved, b"new", overwrite=True)
    assert saved.read_bytes() == b"new"
    assert os.listdir(saved.parent) == [saved.name]


def test_a_file_that_appears_while_one_is_written_is_not_replaced(tmp_path, monkeypatch):
    path, sync = tmp_path / "a", os.fsync

    def another(descriptor: int) -> None:
        path.write_bytes(b"another's")
        sync(descriptor)

    monkeypatch.setattr(publish.os, "fsync", another)
    with pytest.raises(NameTaken):
        publish.publish(path, CONTENT, overwrite=False)
    assert path.read_bytes() == b"another's"
    assert os.listdir(tmp_path) == ["a"]


def without_links(monkeypatch: pytest.MonkeyPatch, number: int = errno.EPERM) -> None:
    def fails(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(publish.os, "link", fails)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_systems_without_links(tmp_path, monkeypatch, number):
    without_links(monkeypatch, number)
    path = tmp_path / "a"
    publish.publish(path, CONTENT, overwrite=False)
    with pytest.raises(NameTaken):
        publish.publish(path, b"new", overwrite=False)
    assert path.read_bytes() == CONTENT
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("there", [True, False])
def test_a_kill_before_any_call_leaves_the_old_file_or_the_new_one(tmp_path, links, overwrite, there):
    """Never a half one. Without links an empty file may hold the new name."""
    path, outcomes, calls = tmp_path / "a", [], 0
    while True:
        for name in os.listdir(tmp_path):
            (tmp_path / name).unlink()
        if there:
            path.write_bytes(b"old")
        status = killed_before_call(calls, path, links=links, overwrite=overwrite)
        left = path.read_bytes() if path.exists() else None
        outcomes.append(left)
        may_be = [b"old"] if there else [None]
        may_be += [CONTENT] if overwrite or not there else []
        may_be += [b""] if not (links or overwrite or there) else []
        assert left in may_be, calls
        others = [name for name in os.listdir(tmp_path) if name != "a"]
        assert all(publish._PART.fullmatch(name) for name in others)
        if os.WIFEXITED(status):
            break
        calls += 1
    assert calls > 8
    assert outcomes[-1] == (b"old" if there and not overwrite else CONTENT)
    assert (CONTENT in outcomes[:-1]) == (overwrite or not there)  # a kill after the name was given


def killed_before_call(number: int, path: Path, *, links: bool, overwrite: bool) -> int:
    """Save in a child that is killed before so many system calls; its status."""
    child = os.fork()
    if child == 0:
        made = 0

        def counted(call: Any) -> Any:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                nonlocal made
                if made == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                made += 1
                return call(*args, **kwargs)

            return wrapped

        def no_links(*args: Any) -> None:
            raise OSError(errno.EPERM, "")

        own = vars(os) | {name: counted(getattr(os, name)) for name in CALLS}
        own["write"] = counted(lambda descriptor, content: os.write(descriptor, content[:4000]))
        publish.os = SimpleNamespace(**own if links else own | {"link": no_links})
        try:
            publish.publish(path, CONTENT, overwrite=overwrite)
        except NameTaken:
            pass
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


def test_what_killed_processes_left_is_removed_once_it_is_old(tmp_path):
    old, young, others = (
        tmp_path / f".{'0' * 16}.part",
        tmp_path / f".{'1' * 16}.part",
        tmp_path / "mine.part",
    )
    for path in (old, young, others):
        path.write_bytes(b"x")
    for path in (old, others):
        os.utime(path, (time.time() - 4000,) * 2)
    publish.publish(tmp_path / "a", CONTENT, overwrite=False)
    assert sorted(os.listdir(tmp_path)) == sorted([young.name, "a", "mine.part"])


def test_what_another_process_has_just_finished_is_no_failure(tmp_path, monkeypatch):
    """Its part is seen in the folder, and gone when it is looked at."""
    (tmp_path / f".{'0' * 16}.part").touch()
    look = os.lstat

    def gone(path: Path) -> os.stat_result:
        if path.name.endswith(".part"):
            raise FileNotFoundError(errno.ENOENT, "")
        return look(path)

    monkeypatch.setattr(publish.os, "lstat", gone)
    publish.publish(tmp_path / "a", CONTENT, overwrite=False)
    assert (tmp_path / "a").read_bytes() == CONTENT


@pytest.mark.parametrize("where", ["open", "write", "fsync", "link"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_call_that_fails_leaves_everything_as_it_was(saved, monkeypatch, where, error):
    def fails(*args: Any, **kwargs: Any) -> None:
        raise error

    target = saved.with_name("b.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(publish.os, where, fails)
        with pytest.raises(TableError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
            publish.publish(target, CONTENT, overwrite=False)
    if isinstance(error, OSError):
        expected = f"{target}: cannot be written: No space left on device. To do: make room on this disk"
        assert str(caught.value) == expected
    assert saved.read_bytes() == CONTENT
    assert os.listdir(saved.parent) == [saved.name]


def test_a_folder_that_cannot_be_synced_is_no_failure(tmp_path, monkeypatch):
    sync = publish.os.fsync

    def only_files(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "")
        sync(descriptor)

    monkeypatch.setattr(publish.os, "fsync", only_files)
    publish.publish(tmp_path / "a", CONTENT, overwrite=False)
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_folder_that_cannot_be_read_is_no_failure(tmp_path, monkeypatch):
    opens = os.open

    def only_files(path: Path, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECTORY:
            raise PermissionError(errno.EACCES, "")
        return opens(path, flags, *mode)

    monkeypatch.setattr(publish.os, "open", only_files)
    publish.publish(tmp_path / "a", CONTENT, overwrite=False)
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_the_file_and_then_its_folder_are_synced(tmp_path, monkeypatch):
    synced, sync = [], os.fsync

    def noted(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    monkeypatch.setattr(publish.os, "fsync", noted)
    publish.publish(tmp_path / "a", CONTENT, overwrite=False)
    part, folder = synced
    assert part.endswith(".part")
    assert folder == str(tmp_path)


def test_a_file_may_not_grow_any_further(saved):
    """For real: the system lets no file grow beyond 100 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        for overwrite in (True, False):
            with pytest.raises(TableError, match=r"cannot be written: File too large. To do: make room"):
                publish.publish(saved.with_name("b"), CONTENT, overwrite=overwrite)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saved.read_bytes() == CONTENT
    assert os.listdir(saved.parent) == [saved.name]


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A disk of 16 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a disk cannot be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk(small_disk):
    path = small_disk / "a"
    publish.publish(path, CONTENT[:5000], overwrite=False)
    for overwrite in (True, False):
        with pytest.raises(TableError, match=r"No space left on device. To do: make room on this disk"):
            publish.publish(path if overwrite else path.with_name("b"), CONTENT, overwrite=overwrite)
    assert path.read_bytes() == CONTENT[:5000]
    assert os.listdir(small_disk) == ["a"]


def test_a_disk_that_can_only_be_read(small_disk):
    path = small_disk / "a"
    publish.publish(path, b"x", overwrite=False)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for attempt in (lambda: publish.publish(path.with_name("b"), b"x", overwrite=False), lambda: publish.check_new(
        path.with_name("b")
    )):  # fmt: skip
        with pytest.raises(
            TableError, match=r"Read-only file system. To do: choose a folder that can be written to"
        ):
            attempt()


def test_places_that_cannot_be_written_to(tmp_path):
    for path, to_do in (
        (tmp_path / "no folder" / "a", "create its folder"),
        (tmp_path / ("x" * 300), "choose a shorter name"),
        (tmp_path / "nu\0ll", ""),
    ):
        with pytest.raises(TableError, match=f"cannot be written: .*{to_do}"):
            publish.publish(path, CONTENT, overwrite=False)
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(NameTaken):
        publish.publish(folder, CONTENT, overwrite=False)
    with pytest.raises(TableError, match="cannot be written"):
        publish.publish(folder, CONTENT, overwrite=True)
    assert os.listdir(tmp_path) == ["folder"]


def test_the_longest_name_can_be_written(tmp_path):
    """The part's name is no longer than the file's."""
    path = tmp_path / ("x" * 255)
    publish.publish(path, CONTENT, overwrite=False)
    assert path.read_bytes() == CONTENT


def test_names_that_another_system_takes_for_the_same_are_taken(tmp_path):
    (tmp_path / "Ünë.safetensors").write_bytes(b"mine")
    for name in ("Ünë.safetensors", "ÜNË.SAFETENSORS", "U\u0308ne\u0308.safetensors"):
        assert publish.is_taken(tmp_path / name), name
        with pytest.raises(NameTaken, match="Choose another name"):
            publish.check_new(tmp_path / name)
    assert not publish.is_taken(tmp_path / "Une.safetensors")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert publish.is_taken(tmp_path / "link")
    for folder in ("link", "Ünë.safetensors", "none"):
        assert not publish.is_taken(tmp_path / folder / "x")


def test_whether_a_new_file_can_be_written_is_known_before(tmp_path):
    path = tmp_path / "new folder" / "a.safetensors"
    publish.check_new(path)
    assert os.listdir(path.parent) == []
    path.write_text("mine")
    with pytest.raises(NameTaken, match="exists already"):
        publish.check_new(path)
    for bad in (path / "b", tmp_path / ("x" * 300) / "b"):
        with pytest.raises(TableError, match="cannot be written"):
            publish.check_new(bad)


def test_the_first_free_name(tmp_path):
    def save(path: Path) -> Path:
        publish.publish(path, b"x", overwrite=False)
        return path

    names = [publish.first_free(publish.numbered(tmp_path / "a.b"), save).name for _ in range(3)]
    assert names == ["a.b", "a-2.b", "a-3.b"]
    with pytest.raises(TableError, match="all names are taken"):
        publish.first_free([tmp_path / "a.b"], save)


WRITER = """
import sys
from pathlib import Path
from dode_nodes.tables import publish
folder, mark = Path(sys.argv[1]), sys.argv[2]
(folder / f"{mark}.ready").touch()
while len(list(folder.glob("*.ready"))) < 2:
    pass
for n in range(40):
    def save(path):
        publish.publish(path, f"{mark} {n}".encode() * 1000, overwrite=False)
    publish.first_free(publish.numbered(folder / "a.b"), save)
"""


def test_two_processes_in_one_folder_lose_nothing(tmp_path):
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, tmp_path, mark], stderr=subprocess.PIPE)
        for mark in "xy"
    ]
    for writer in writers:
        _, failed = writer.communicate(timeout=60)
        assert writer.returncode == 0, failed
    written = sorted(path.read_text() for path in tmp_path.glob("a*.b"))
    assert written == sorted(f"{mark} {n}" * 1000 for mark in "xy" for n in range(40))
    assert not list(tmp_path.glob(".*"))
