"""Files and folders appear whole; nobody's link is followed, nobody's file is lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path

import pytest

from cli_steps import tree
from var_deploy import files
from var_deploy.bundle import place as bundle_place
from var_deploy.bundle.place import BUNDLE, check_place
from var_deploy.errors import BundleError, UsageError, VarDeployError
from var_deploy.files import folders, work_folders

BIG = 300_000  # bytes: more than one write
POSIX = pytest.mark.skipif(os.name != "posix", reason="links, locks and umask of POSIX")


# one file


def test_the_temporary_name_is_new_and_cannot_be_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link at that very name, should somebody guess it, is not written through."""
    (tmp_path / "theirs").write_bytes(b"theirs")
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "ab" * count)
    link = tmp_path / f".x.{'ab' * 8}.tmp"
    link.symlink_to("theirs")
    with pytest.raises(BundleError, match="x cannot be written: File exists"):  # noqa: SIM117
        with files.whole_file(tmp_path / "x", error=BundleError) as stream:
            stream.write(b"ours")
    assert (tmp_path / "theirs").read_bytes() == b"theirs"
    assert not (tmp_path / "x").exists()


def test_links_are_followed_or_replaced_as_asked(tmp_path: Path) -> None:
    for follow in (True, False):
        (tmp_path / "blob").write_bytes(b"shared")
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to("blob")
        with files.whole_file(tmp_path / "link", follow=follow) as stream:
            stream.write(b"new")
        assert (tmp_path / "link").read_bytes() == b"new"
        assert (tmp_path / "link").is_symlink() is follow
        assert (tmp_path / "blob").read_bytes() == (b"new" if follow else b"shared")


def test_a_name_may_be_as_long_as_the_system_takes(tmp_path: Path) -> None:
    longest = os.pathconf(tmp_path, "PC_NAME_MAX")
    path = tmp_path / ("x" * longest)
    files.check_writable(path)
    with files.whole_file(path) as stream:
        stream.write(b"whole")
    assert path.read_bytes() == b"whole"
    for name in ("x" * (longest + 1), "ж" * (longest // 2 + 1)):
        with pytest.raises(UsageError, match=rf"has \d+ bytes, .* at most {longest}; choose"):
            files.check_writable(tmp_path / "new" / name / "x.png")
    with pytest.raises(UsageError, match="cannot be written"):
        files.check_writable(tmp_path.joinpath(*["x" * 200] * 30))
    assert len(list(tmp_path.iterdir())) == 1


@POSIX
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_new_file_takes_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with files.whole_file(tmp_path / "new" / "x"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new" / "x").stat().st_mode) == 0o666 & ~mask
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o777 & ~mask


def test_data_are_on_the_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    replace, fsync = Path.replace, os.fsync

    def note_sync(handle: int) -> None:
        order.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def note_replace(path: Path, target: Path) -> Path:
        order.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_replace)
    with files.whole_file(tmp_path / "x") as stream:
        stream.write(b"x")
    assert order == ["file", "rename", "folder"]


def write_often(path: Path, number: int) -> None:
    for _ in range(20):
        with files.whole_file(path) as stream:
            stream.write(bytes([number]) * (BIG + number))


@POSIX
def test_of_many_writers_one_wins(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=write_often, args=(tmp_path / "x", n)) for n in range(8)]
    for child in children:
        child.start()
    seen = 0
    while any(child.is_alive() for child in children):
        if (tmp_path / "x").exists():
            data = (tmp_path / "x").read_bytes()
            assert len(set(data)) == 1 and len(data) == BIG + data[0], "two writers are mixed"
            seen += 1
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert seen
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@POSIX
def test_temporary_files_of_the_dead_go_and_of_the_living_stay(tmp_path: Path) -> None:
    dead = tmp_path / f".x.{'0' * 16}.tmp"
    dead.write_bytes(b"half")
    (tmp_path / f".pipe.{'1' * 16}.tmp").symlink_to("user")
    (tmp_path / "user").write_bytes(b"theirs")
    with files.whole_file(tmp_path / "y") as stream:
        stream.write(b"whole")
        files.remove_dead_files(tmp_path)
        assert not dead.exists()
    assert (tmp_path / "y").read_bytes() == b"whole"
    assert (tmp_path / "user").read_bytes() == b"theirs"


# what counts as empty


def test_what_systems_leave_does_not_fill_a_folder(tmp_path: Path) -> None:
    nfs = f".nfs{'0' * 17}"
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._x", nfs, ".a.01234567.tmp"):
        (tmp_path / name).touch()
    (tmp_path / "lost+found").mkdir()
    assert work_folders.entries_that_count(tmp_path) == []
    check_place(tmp_path, replace=False)
    for name in ("notes.txt", ".gitignore", ".nfs", "tmp"):
        (tmp_path / name).touch()
        assert work_folders.entries_that_count(tmp_path) == [name]
        (tmp_path / name).unlink()


# folders with an index


def put(folder: Path, **texts: str) -> None:
    """A folder whose manifest.json names these files."""
    for name, text in texts.items():
        path = folder / name.replace("_", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    names = {name.replace("_", "/"): {} for name in texts}
    data = {"schema_version": 1, "model": {}, "graphs": {}, "files": names}
    (folder / "manifest.json").write_text(json.dumps(data))


def write(
    out: Path, during: Callable[[], object] = lambda: None, *, replace: bool = True, **texts: str
) -> None:
    check = lambda: check_place(out, replace=replace)  # noqa: E731
    with folders.whole_folder(out, check=check, index=BUNDLE) as stage:
        put(stage, **(texts or {"fp32_new": "new"}))
        during()


def held(folder: Path) -> Collection[str]:
    return {name for name, data in tree(folder).items() if data is not None}


@pytest.fixture(params=["exchange", "renames", "inside"])
def out(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of a folder, replaced in each of the three ways."""
    if request.param == "renames":
        monkeypatch.setattr(folders, "swap", lambda one, other: False)
    elif request.param == "inside":
        monkeypatch.setattr(folders, "must_write_inside", lambda place: place.is_dir())
        (tmp_path / "out").mkdir()
    elif sys.platform != "linux":
        pytest.skip("renameat2 is Linux's")
    return tmp_path / "out"


def test_only_what_the_old_index_names_is_replaced(out: Path) -> None:
    write(out, fp32_old="old", fp32_both="old", int8_old="old")
    (out / "engines" / "sm87").mkdir(parents=True)
    (out / "engines" / "sm87" / "step.plan").write_text("plan")
    (out / ".DS_Store").write_text("view")
    write(out, fp32_both="new", fp16_new="new")
    assert held(out) == {
        *("manifest.json", "fp32/both", "fp16/new", "engines/sm87/step.plan", ".DS_Store")
    }
    assert (out / "fp32" / "both").read_text() == "new"
    assert sorted(p.name for p in out.iterdir()) == sorted(
        {".DS_Store", "engines", "fp16", "fp32", "manifest.json"}
    ), "no empty folder stays"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["notes.txt", "fp32/notes.txt", "mine/deep/x.png", "empty/"])
@pytest.mark.parametrize("when", ["before", "during"])
def test_a_foreign_file_is_named_and_stays(out: Path, name: str, when: str) -> None:
    write(out, fp32_old="old")

    def appear() -> None:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            (out / name).mkdir()
        else:
            (out / name).write_text("mine")

    if when == "before":
        appear()
    before = tree(out)
    with pytest.raises(UsageError, match=f"holds {name.strip('/')}, which is not part of the"):
        write(out, appear if when == "during" else lambda: None)
    if when == "during":
        assert held(out) == held(out) | {"manifest.json", "fp32/old"}
        (out / name).rmdir() if name.endswith("/") else (out / name).unlink()
    else:
        assert tree(out) == before
    assert (out / "fp32" / "old").read_text() == "old"
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert not [path for path in out.iterdir() if ".partial-" in path.name]


def test_a_file_that_comes_after_the_last_look_is_moved_over(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(out, fp32_old="old")
    checks: list[None] = []

    def check() -> None:
        check_place(out, replace=True)
        checks.append(None)
        if len(checks) == 2:  # right before the exchange
            (out / "fp32" / "late.txt").write_text("mine")

    with folders.whole_folder(out, check=check, index=BUNDLE) as stage:
        put(stage, fp32_new="new")
    assert held(out) == {"manifest.json", "fp32/new", "fp32/late.txt"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_late_file_whose_name_is_taken_is_told_and_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write(out, fp32_old="old")
    checks: list[None] = []

    def check() -> None:
        check_place(out, replace=True)
        checks.append(None)
        if len(checks) == 2:
            (out / "fp32" / "new").write_text("mine")

    with pytest.raises(VarDeployError, match=r"lies in .*partial-"):  # noqa: SIM117
        with folders.whole_folder(out, check=check, index=BUNDLE) as stage:
            put(stage, fp32_new="new")
    assert (out / "fp32" / "new").read_text() == "new"
    (kept,) = tmp_path.glob(".out.partial-*/complete/fp32/new")
    assert kept.read_text() == "mine"
    write(out)  # and the next one does not take it for its own
    assert kept.read_text() == "mine"


def test_without_replace_what_appears_meanwhile_stays(out: Path) -> None:
    with pytest.raises(UsageError, match=r"not empty and holds no bundle \(mine.txt is there"):
        write(out, lambda: put_text(out / "mine.txt"), replace=False)
    assert held(out) == {"mine.txt"}
    (out / "mine.txt").unlink()
    with pytest.raises(UsageError, match="already holds a bundle; --force replaces it"):
        write(out, lambda: write(out, fp32_other="other"), replace=False)
    assert held(out) == {"manifest.json", "fp32/other"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def put_text(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")


@pytest.mark.parametrize(
    "text",
    [
        *("", "{}", "[]", "not JSON", "[" * 100_000),
        '{"manifest_version": 3, "name": "an extension"}',
        '{"schema_version": 1, "model": {}, "graphs": {}, "files": {"../x": {}}}',
        '{"schema_version": 1, "model": {}, "graphs": {}, "files": ["x"]}',
    ],
)
def test_another_manifest_is_never_replaced(tmp_path: Path, text: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text(text)
    (tmp_path / "x").write_text("mine")
    before = tree(tmp_path)
    for replace in (True, False):
        with pytest.raises(UsageError, match=r"manifest\.json is not a var-deploy manifest"):
            write(tmp_path / "out", replace=replace)
    assert tree(tmp_path) == before


@POSIX
def test_a_manifest_that_never_ends_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(UsageError, match="is not a var-deploy manifest"):
        check_place(tmp_path, replace=True)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "manifest.json").symlink_to("/dev/zero")
    with pytest.raises(UsageError, match="is not a var-deploy manifest"):
        check_place(tmp_path, replace=True)


def test_links_of_a_cache_are_replaced_and_their_targets_stay(out: Path) -> None:
    blobs = out.parent / "blobs"
    write(out, fp32_old="old", fp32_both="old")
    blobs.mkdir()
    for name in ("manifest.json", "fp32/old", "fp32/both"):
        blob = blobs / name.replace("/", "_")
        (out / name).rename(blob)
        (out / name).symlink_to(blob)
    before = tree(blobs)
    write(out, fp32_both="new")
    assert tree(blobs) == before
    assert held(out) == {"manifest.json", "fp32/both"}
    assert not [path for path in out.rglob("*") if path.is_symlink()]


# cut off


STEPS = ("rename", "replace", "unlink", "rmdir", "touch", "mkdir")


def killed_at(stop: int, out: Path) -> bool:
    """Write in a process that is killed before its n-th step; whether it came as far as that."""
    child = os.fork()
    if child == 0:
        count = 0

        def stopping(real: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **options: object) -> object:
                nonlocal count
                count += 1
                if count == stop:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            return call

        for name in STEPS:
            setattr(Path, name, stopping(getattr(Path, name)))
        folders.swap = stopping(folders.swap)  # type: ignore[assignment]
        try:
            write(out, fp32_both="new", fp16_new="new")
        finally:
            os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


@POSIX
def test_a_kill_at_any_step_loses_nothing(out: Path) -> None:
    """The folder is whole after each kill, and the next writer removes what is left beside it."""
    inside = folders.must_write_inside(out)
    atomic = not inside and folders.swap.__name__ == "swap"
    for stop in range(1, 80):
        write(out, fp32_old="old", fp32_both="old")
        (out / "engines").mkdir(exist_ok=True)
        (out / "engines" / "plan").write_text("plan")
        if not killed_at(stop, out):
            assert stop > 8, "the steps were never met"
            return
        found = held(out) if out.is_dir() else set()
        if atomic:
            old, new = {"fp32/old", "fp32/both"}, {"fp32/both", "fp16/new"}
            assert found - {"engines/plan", "manifest.json"} in (old, new), f"step {stop}"
        if atomic or "manifest.json" in found:
            assert found >= set(bundle_place.listed_files(out)), f"step {stop}: half of it"
        write(out, fp32_last="last")
        assert held(out) == {"manifest.json", "fp32/last", "engines/plan"}, f"step {stop}"
        assert [path.name for path in out.parent.iterdir()] == ["out"], f"step {stop}"
    pytest.fail("it never came to an end")


def write_rounds(out: Path, number: int) -> None:
    for _ in range(15):
        write(out, fp32_both=str(number), **{f"fp32_of{number}": str(number)})


@POSIX
def test_of_two_writers_of_one_folder_one_wins(out: Path) -> None:
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=write_rounds, args=(out, n)) for n in (1, 2, 3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    winner = (out / "fp32" / "both").read_text()
    assert held(out) == {"manifest.json", "fp32/both", f"fp32/of{winner}"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


# folders that cannot be renamed


def test_the_folder_that_a_shell_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    (out / "engines").mkdir(parents=True)
    inode = out.stat().st_ino
    for here in (out, out / "engines"):
        monkeypatch.chdir(here)
        write(Path() if here == out else out, fp32_new=here.name)
        assert out.stat().st_ino == inode and Path.cwd() == here
        assert held(out) == {"manifest.json", "fp32/new"}
        (out / "engines").mkdir(exist_ok=True)


@POSIX
def test_a_mount_point(tmp_path: Path) -> None:
    """As a container's volume is: a folder of the same disk, mounted on itself."""
    out = tmp_path / "volume"
    out.mkdir()
    mounted = subprocess.run(["mount", "--bind", out, out], capture_output=True)
    if mounted.returncode:
        pytest.skip("mount --bind needs root")
    try:
        assert folders.must_write_inside(out)
        write(out, fp32_old="old")
        write(out, fp32_new="new")
        assert held(out) == {"manifest.json", "fp32/new"}
    finally:
        subprocess.run(["umount", out], check=True)
    assert held(out) == {"manifest.json", "fp32/new"}


def test_a_parent_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    write(out, fp32_old="old")
    real = files.check_writable

    def check(path: Path) -> None:
        if path == tmp_path:
            raise UsageError("read-only")
        real(path)

    monkeypatch.setattr(folders, "check_writable", check)
    write(out, fp32_new="new")
    assert held(out) == {"manifest.json", "fp32/new"}
    with pytest.raises(UsageError, match="is a file; name a folder"):
        write(out / "manifest.json")


# folders of single files


def test_of_two_that_fill_a_new_folder_one_comes_after_the_other(tmp_path: Path) -> None:
    out = tmp_path / "new"
    with folders.filled_folder(out, ["a", "b"]) as stage:
        for name in ("a", "b"):
            (stage / name).write_text("first")
        with folders.filled_folder(out, ["a", "b"]) as other:
            for name in ("a", "b"):
                (other / name).write_text("second")
    assert {name: data for name, data in tree(out).items()} == {"a": b"first", "b": b"first"}
    (out / "c").mkdir()
    with pytest.raises(UsageError, match="c is not an ordinary file"):  # noqa: SIM117
        with folders.filled_folder(out, ["a", "c"]) as stage:
            (stage / "a").write_text("third")
            (stage / "c").write_text("third")
    assert (out / "a").read_text() == "first", "all of them or none"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "c", "new"]
