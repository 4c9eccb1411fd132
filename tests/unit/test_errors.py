"""Which errors of the system are the user's to correct: only these end a job without a requeue."""

import errno
import os

import pytest

from megastar.errors import as_user_error


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free space or name another place"),
        (errno.EDQUOT, "free space or"),
        (errno.EACCES, "change its permissions or"),
        (errno.EPERM, "change its permissions or"),
        (errno.EROFS, "change its permissions or"),
    ],
)
def test_what_the_user_can_correct(number, remedy):
    error = as_user_error(OSError(number, os.strerror(number), "/x"))
    assert error is not None and f"cannot access /x ({os.strerror(number)}): {remedy}" in str(error)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOMEM, errno.EMFILE])
def test_a_disk_or_machine_that_fails_for_a_while_is_no_user_error(number):
    assert as_user_error(OSError(number, os.strerror(number), "/x")) is None


def test_a_file_in_the_place_of_a_folder_is_one_and_a_race_is_none(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    for path in ("file/a/b", "file", "dangling", "dangling/a"):
        with pytest.raises(OSError) as found:
            (tmp_path / path).mkdir()
        if not isinstance(found.value, FileNotFoundError):
            assert "remove what is there or name another place" in str(as_user_error(found.value)), path
    with pytest.raises(FileExistsError) as race:
        tmp_path.mkdir()
    assert as_user_error(race.value) is None
    for number in (errno.EPERM, errno.EEXIST):  # without a file: of a call that concerns none
        assert as_user_error(OSError(number, os.strerror(number))) is None
