"""Parts of samples: any that the pipeline can write is read, and no other."""

from __future__ import annotations

import tracemalloc
import zipfile

import numpy as np
import pytest

from megastar.errors import UserError
from megastar.sampling.distributed import iterate_images, part_of
from megastar.sampling.npz import save_npz
from tests.unit.sampling.test_distributed import make_pipeline, networks  # noqa: F401


def test_a_part_of_any_size_that_is_written_is_read(networks, tmp_path):  # noqa: F811
    p = make_pipeline(networks, 23, batch=22, size=4096)  # 1.03 GiB of images in a part
    picture = np.arange(4096 * 4096 * 3, dtype=np.uint32).astype(np.uint8).reshape(1, 4096, 4096, 3)
    save_npz(part_of(tmp_path, 0), (22, 4096, 4096, 3), (picture + n for n in range(22)), np.arange(22))
    save_npz(part_of(tmp_path, 1), (1, 4096, 4096, 3), [picture], np.arange(1))
    sizes = []
    for ids, images in iterate_images(p, folder=tmp_path):
        sizes.append(images.nbytes)
        assert all((images[i] == picture[0] + i).all() for i in (0, len(ids) - 1))
    assert sizes == [22 * picture.nbytes, picture.nbytes] and sizes[0] > 1 << 30


def test_a_part_of_other_images_than_those_of_the_pipeline_is_refused_before_it_is_read(networks, tmp_path):  # noqa: F811
    p, images = make_pipeline(networks, 3), np.zeros((4, 16, 16, 3), np.uint8)
    for wrong, labels in (
        (images, np.zeros(4)), (images[:2], np.zeros(2)), (images[:3], np.zeros(2)), (images[:3, :, :8], np.zeros(3)),
    ):  # fmt: skip
        path = part_of(tmp_path, 0)
        np.savez(path, arr_0=wrong, arr_1=labels.astype(np.int64))
        with pytest.raises(UserError, match=r"part-00000.npz is damaged .*: remove it and run again"):
            next(iterate_images(p, folder=tmp_path))
    np.savez(path, arr_0=images[:1].astype(np.uint32)[:, :, :4], arr_1=np.zeros(3, np.int64))
    with pytest.raises(UserError, match="uint32"):
        next(iterate_images(p, folder=tmp_path))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("arr_0.npy", "w") as member:
        header = {"descr": "|u1", "fortran_order": False, "shape": (48, 4096, 1365, 1)}  # 256 MB, compressed to 256 KB
        np.lib.format.write_array_header_1_0(member, header)
        for _ in range(48):
            member.write(bytes(4096 * 1365))
    tracemalloc.start()
    with pytest.raises(UserError, match=f"at most {3 * 16 * 16 * 3} can be read"):
        next(iterate_images(p, folder=tmp_path))
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
