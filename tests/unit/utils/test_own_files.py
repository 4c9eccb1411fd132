"""Files and folders that other users could have planted."""

import os

import pytest

from megastar.errors import UserError
from megastar.utils.own_files import open_own, own_folder

ROOT = os.geteuid() == 0
OTHER = 12345


def test_a_folder_that_others_may_write_to_gets_one_of_this_user(tmp_path):
    private = tmp_path / "private"
    assert own_folder(private) == private and private.stat().st_mode & 0o777 == 0o755
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    mine = own_folder(shared)
    assert mine == shared / f"megastar-{os.geteuid()}" and mine.stat().st_mode & 0o777 == 0o700
    assert own_folder(shared) == mine
    mine.chmod(0o770)
    with pytest.raises(UserError, match="others may write to it: remove it, or name a folder of your own"):
        own_folder(shared)
    mine.rmdir()
    mine.symlink_to(private)
    with pytest.raises(UserError, match="is a link, belongs to another user"):
        own_folder(shared)


@pytest.mark.skipif(not ROOT, reason="needs root to give files away")
def test_another_users_folder_is_not_used(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, OTHER, OTHER)
    assert own_folder(theirs) == theirs / "megastar-0"
    os.chown(theirs / "megastar-0", OTHER, OTHER)
    with pytest.raises(UserError, match="belongs to another user"):
        own_folder(theirs)
    (tmp_path / "target").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "target")
    assert own_folder(link) == link  # of this user
    os.chown(link, OTHER, OTHER, follow_symlinks=False)
    with pytest.raises(UserError, match="link is a symbolic link of another user"):
        own_folder(link)


def test_only_regular_files_of_this_user_are_opened(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"abc")
    with open_own(path) as f:
        assert f.read() == b"abc"
    (tmp_path / "link").symlink_to(path)
    os.link(path, tmp_path / "hard")
    os.mkfifo(tmp_path / "pipe")
    flags = os.O_RDWR | os.O_CREAT
    for name, how in (("link", os.O_RDONLY), ("link", flags), ("hard", flags), ("pipe", os.O_RDONLY)):
        with pytest.raises(PermissionError):
            open_own(tmp_path / name, how)
    with pytest.raises(FileNotFoundError):
        open_own(tmp_path / "missing")
    assert path.read_bytes() == b"abc"
    if ROOT:
        (tmp_path / "hard").unlink()
        os.chown(path, OTHER, OTHER)
        with pytest.raises(PermissionError, match="is not a file of this user"):
            open_own(path)
