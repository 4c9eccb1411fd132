"""``TokenDataset``: the samples of the shards, in any process."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from megastar.data.dataset import TokenDataset
from megastar.errors import UserError
from tests.unit.data.shards.test_shards import VIEWS, T, sample, write_set


@pytest.fixture
def folder(tmp_path):
    return write_set(tmp_path / "shards")


def expected(i: int) -> dict[str, object]:
    codes, label = sample(i)
    return {"codes": torch.from_numpy(codes), "label": label, "id": i}


def same(a: dict, b: dict) -> bool:
    return (
        a.keys() == b.keys() and torch.equal(a["codes"], b["codes"]) and (a["label"], a["id"]) == (b["label"], b["id"])
    )


def test_samples_are_those_of_the_shards(folder):
    data = TokenDataset(folder)
    assert len(data) == 9 and data.classes == list("abcd") and data.manifest.views == VIEWS
    assert all(same(got, expected(i)) for i, got in enumerate(data))  # ends by IndexError
    assert data[0]["codes"].dtype == torch.int64 and data[0]["codes"].shape == (VIEWS, T)
    assert same(data[-1], expected(8)) and type(data[0]["label"]) is type(data[0]["id"]) is int
    assert [s["id"] for s in data.__getitems__([7, 0, 7])] == [7, 0, 7]
    for outside in (9, -10):
        with pytest.raises(IndexError, match=f"sample {outside} is outside the 9 samples of .*shards"):
            data[outside]


def test_views_by_number_and_at_random(folder):
    chosen = TokenDataset(folder, views=[2, 0])[4]["codes"]
    assert np.array_equal(chosen, sample(4)[0][[2, 0]])
    drawn = TokenDataset(folder, views=2)
    torch.manual_seed(0)
    codes, stored = [drawn[4]["codes"] for _ in range(100)], sample(4)[0].tolist()
    pairs = {tuple(stored.index(view) for view in c.tolist()) for c in codes}
    assert pairs == {(a, b) for a in range(3) for b in range(3) if a != b}  # all, and never one view twice
    torch.manual_seed(0)
    assert torch.equal(drawn[4]["codes"], codes[0])


@pytest.mark.dist
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_what_this_process_reads(folder, start):
    data = TokenDataset(folder)
    assert same(data[3], expected(3))  # the parent's shards are open when the workers start
    order = torch.Generator().manual_seed(1)
    loader = DataLoader(
        data,
        batch_size=2,
        shuffle=True,
        num_workers=2,
        multiprocessing_context=start,
        generator=order,
        persistent_workers=True,
    )
    for _ in range(2):
        ids = []
        for batch in loader:
            assert batch["codes"].shape[1:] == (VIEWS, T)
            for codes, label, i in zip(batch["codes"], batch["label"], batch["id"], strict=True):
                assert same({"codes": codes, "label": int(label), "id": int(i)}, expected(int(i)))
                ids.append(int(i))
        assert sorted(ids) == list(range(9)) != ids
    assert same(data[3], expected(3))


def test_a_copy_opens_the_shards_itself(folder):
    data = TokenDataset(folder, views=[1])
    first = data[5]
    other = pickle.loads(pickle.dumps(data))
    assert other._shards is None and same(other[5], first)
    data.close()
    assert same(data[5], first)


def test_what_cannot_be_read(folder, tmp_path):
    for views, message in (
        (0, "views = 0: the shards in .*shards store 3 views per image; give 1 to 3"),
        (4, "views = 4: "),
        ([0, 3], r"views = \[0, 3\]: select at least one of the views 0 to 2 stored in .*shards"),
        ([], r"views = \[\]: select at least one"),
    ):
        with pytest.raises(UserError, match=message):
            TokenDataset(folder, views=views)
    with pytest.raises(UserError, match="token shards folder .*none does not exist"):
        TokenDataset(tmp_path / "none")
    narrow = TokenDataset(write_set(tmp_path / "narrow", codebook_size=20))
    with pytest.raises(UserError, match="outside the codebook of 20"):
        narrow[0]
    with pytest.raises(UserError, match="outside the codebook of 20"):
        next(iter(DataLoader(narrow, num_workers=1)))
