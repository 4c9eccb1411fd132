"""Every sample of an epoch exactly once, in the order of a plain reimplementation, whatever the ranks, the cuts of the
batch and the interruptions."""

import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megastar.data.loader import TokenLoader
from megastar.data.order import OrderSpec, sample_ids, shards_from
from tests.loaders import epoch_order, make_loader
from tests.unit.data.shards.test_shards import T, V, sample, write_set


# The order, written the slow way ---------------------------------------------------------------------------------
def draws(n: int, *key: int) -> list[int]:
    return np.random.PCG64(np.random.SeedSequence(key)).random_raw(n).tolist()


def shuffled(items: list[int], *key: int) -> list[int]:
    return [item for _, _, item in sorted(zip(draws(len(items), *key), range(len(items)), items, strict=True))]


def plain_order(seed: int, epoch: int, sizes: list[int], window: int) -> list[int]:
    """One epoch, as the documentation of data/order.py tells it."""
    ids, start = [], 0
    for size in sizes:
        ids.append(list(range(start, start + size)))
        start += size
    shards = [s for s in shuffled(list(range(len(sizes))), seed, epoch, 0) if sizes[s]]
    if len(shards) <= window:
        return shuffled([i for s in shards for i in ids[s]], seed, epoch, 1, 0)
    slots: list[list[int]] = [[] for _ in range(len(shards) + window - 1)]
    cuts = [raw % window for raw in draws(len(shards), seed, epoch, 3)]
    for place, shard in enumerate(shards):
        samples = shuffled(ids[shard], seed, epoch, 2, shard)
        for number, i in enumerate(samples):
            j = next(j for j in range(window) if number < ((j + 1) * len(samples) + cuts[place]) // window)
            slots[place + j].append(i)
    return [i for number, slot in enumerate(slots) for i in shuffled(slot, seed, epoch, 1, number)]


sizes_of = st.lists(st.integers(0, 30) | st.sampled_from([0, 1]), min_size=1, max_size=14).filter(any)


@settings(max_examples=150, deadline=None)
@given(sizes=sizes_of, window=st.integers(1, 16), seed=st.integers(0, 2**40), epoch=st.integers(0, 400))
def test_the_order_is_the_plain_one(sizes, window, seed, epoch):
    spec = OrderSpec(seed, tuple(sizes), window)
    expected = plain_order(seed, epoch, sizes, window)
    assert epoch_order(spec, epoch).tolist() == expected
    assert sorted(expected) == list(range(sum(sizes)))


@settings(max_examples=100, deadline=None)
@given(
    sizes=sizes_of, window=st.integers(1, 8), seed=st.integers(0, 99), batch=st.integers(1, 50),
    start=st.integers(0, 500), count=st.integers(1, 200),
)  # fmt: skip
def test_any_stretch_of_positions(sizes, window, seed, batch, start, count):
    spec, N = OrderSpec(seed, tuple(sizes), window), sum(sizes)
    epochs = range(start // N, (start + count) // N + 1)
    expected = [(i, e) for e in epochs for i in plain_order(seed, e, sizes, window)]
    expected = expected[start - epochs[0] * N :][:count]
    ids, of = sample_ids(spec, start, count)
    assert list(zip(ids.tolist(), of.tolist(), strict=True)) == expected
    step = start // batch
    walked = np.concatenate([sample_ids(spec, (step + k) * batch, batch)[0] for k in range(3)])
    assert walked.tolist() == sample_ids(spec, step * batch, 3 * batch)[0].tolist()
    # What is announced is what is touched, no later than it is.
    shard_of = np.searchsorted(np.cumsum(sizes), ids, side="right").tolist()
    touched = list(dict.fromkeys(shard_of))
    ahead = list(islice(shards_from(spec, start), window + len(touched) + len(sizes) * (len(epochs) - 1)))
    assert set(touched) <= set(ahead) and all(sizes[s] for s in ahead)


# The loader ------------------------------------------------------------------------------------------------------
@st.composite
def runs(draw):
    """A set of shards, a batch, and stretches of a run: steps, ranks and accumulation of each."""
    sizes = draw(st.lists(st.sampled_from([0, 1, 2, 5, 9]), min_size=1, max_size=6).filter(any))
    N = sum(sizes)
    cut = [(w, a) for w in (1, 2, 3, 4, 6) for a in (1, 2, 3) if w * a <= N]
    first = draw(st.sampled_from(cut))
    units = first[0] * first[1]
    batch = units * draw(st.integers(1, N // units))
    cuts = [c for c in cut if batch % (c[0] * c[1]) == 0]
    stretches = draw(st.lists(st.tuples(st.integers(0, 4), st.sampled_from(cuts)), max_size=3))
    done, whole = sum(n for n, _ in stretches), -(-N // batch) + 1  # to beyond the epoch's end
    stretches.append((max(1, whole - done), first))
    return sizes, batch, draw(st.integers(1, 7)), draw(st.integers(0, 1000)), stretches


@settings(max_examples=40, deadline=None)
@given(run=runs(), lost=st.integers(0, 2))
def test_an_interrupted_run_on_changing_ranks_sees_each_sample_once(run, lost):
    """Each stretch ends with ``lost`` micro-batches beyond the saved step, read but not saved; a state of any rank
    starts every rank of the next."""
    sizes, batch, window, seed, stretches = run
    N = sum(sizes)
    settings = {"seed": seed, "global_batch": batch, "views": 2, "class_dropout_prob": 0.3, "num_classes": 4}
    settings |= {"vocab_size": V, "tokens": T, "window": window}
    seen: list[int] = []
    rows: list[tuple] = []
    with tempfile.TemporaryDirectory() as folder:
        write_set(Path(folder) / "s", sizes)

        def open_loader(**changes) -> TokenLoader:
            return make_loader(Path(folder) / "s", **settings, **changes)

        state = {"samples": 0}
        for steps, (world, accumulation) in stretches:
            ranks = [open_loader(rank=r, world=world, accumulation=accumulation) for r in range(world)]
            states = []
            micros: list[list[dict]] = []
            for loader in ranks:
                loader.load_state_dict(state)
                batches = iter(loader)
                micros.append([next(batches) for _ in range(steps * accumulation)])
                states.append(loader.state_dict())
                for _ in range(min(lost, accumulation - 1)):  # the step that a kill cuts short
                    next(batches)
                assert loader.state_dict() == states[-1]
                batches.close()
            assert len({s["samples"] for s in states}) == 1
            state = states[-1]
            for micro in range(steps * accumulation):
                for r in range(world):
                    got = micros[r][micro]
                    seen += got["ids"].tolist()
                    rows += [
                        (got["step"], c.tolist(), int(n)) for c, n in zip(got["codes"], got["labels"], strict=True)
                    ]
        straight = open_loader()
        expected = [straight.batch(step) for step in range(len(seen) // batch)]
        straight.close()
    for epoch in range(len(seen) // N):
        assert sorted(seen[epoch * N : (epoch + 1) * N]) == list(range(N))
    order = [i for e in range(len(seen) // N + 1) for i in plain_order(seed, e, sizes, window)]
    assert seen == order[: len(seen)]
    assert rows == [
        (b["step"], c.tolist(), int(n)) for b in expected for c, n in zip(b["codes"], b["labels"], strict=True)
    ]
    for i, (_, codes, label) in zip(seen, rows, strict=True):
        stored, own = sample(i)
        assert label in (own, 4) and all(view in stored.tolist() for view in codes)
