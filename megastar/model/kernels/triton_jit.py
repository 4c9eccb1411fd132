"""The Triton kernels: attention over a key's column interval and a window on the grid, forward and backward.

Tiles of queries x keys; online softmax in base 2 and its log-sum-exp kept for the backward pass, as in FlashAttention-2
(arXiv 2307.08691) and Triton's tutorial; intervals as in FlashMask (arXiv 2410.01359). Fully hidden tiles are not
visited, fully visible ones load no mask. No atomics: results are deterministic. Importing this module requires Triton.

Names: i queries, j keys, d head dimension; BM, BN, BD the tile's extent in each (BD a power of two, D the real one).
All strides are multiples of the largest power of two in D. Triton only tests arguments for multiples of 16, so for other
values of D ``multiple_of`` states the alignment: without it, single elements are loaded and registers spill.
"""

import triton
import triton.language as tl


@triton.jit
def place(tiles):
    """This program's tile, and its sequence and head: one grid axis, since the others are limited to 65,535."""
    program = tl.program_id(0)
    return program % tiles, (program // tiles).to(tl.int64)


@triton.jit
def head_of(pointer, b, h, sb, sh, D: tl.constexpr):
    """Pointer to the matrix of sequence b and head h."""
    return pointer + tl.multiple_of(b * sb + h * sh, D & -D)


@triton.jit
def rows(pointer, at, stride, size, D: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr):
    """Rows ``at`` of a (size, D) matrix: (len(at), BD), zeros outside."""
    d = tl.arange(0, BD)
    where = pointer + tl.multiple_of(at.to(tl.int64) * stride, D & -D)[:, None] + d[None, :]
    if EVEN and D == BD:
        return tl.load(where)
    elif EVEN:
        return tl.load(where, mask=(d < D)[None, :], other=0.0)
    else:
        return tl.load(where, mask=(at < size)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def store(pointer, at, stride, size, values, D: tl.constexpr, BD: tl.constexpr):
    d = tl.arange(0, BD)
    where = pointer + tl.multiple_of(at.to(tl.int64) * stride, D & -D)[:, None] + d[None, :]
    tl.store(where, values.to(pointer.dtype.element_ty), mask=(at < size)[:, None] & (d < D)[None, :])


@triton.jit
def visible(
    i, j, start, end, size,
    START: tl.constexpr, END: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EVEN: tl.constexpr, KEYS_DOWN: tl.constexpr,
):  # fmt: skip
    """Whether queries i see keys j: (len(i), len(j)), or with KEYS_DOWN (len(j), len(i))."""
    inside = j < size
    low, high = j, j
    if START:
        low = tl.load(start + j, mask=inside, other=0)
    if END:
        high = tl.load(end + j, mask=inside, other=0)
    if KEYS_DOWN:
        i, j, low, high, inside = i[None, :], j[:, None], low[:, None], high[:, None], inside[:, None]
    else:
        i, j, low, high, inside = i[:, None], j[None, :], low[None, :], high[None, :], inside[None, :]
    seen = i >= low
    if END:
        seen = seen & (i < high)
    elif not EVEN:
        seen = seen & inside
    if WIDTH:
        down, right = (i - 1) // WIDTH - (j - 1) // WIDTH, (i - 1) % WIDTH - (j - 1) % WIDTH
        near = (down <= ROWS) & (down >= -ROWS) & (right <= COLUMNS) & (right >= -COLUMNS)
        seen = seen & (near | (i == 0) | (j == 0))
    return seen


@triton.jit
def counts(full, visited, order, sequence, tile, tiles, others, SHARED: tl.constexpr):
    """Number of fully visible tiles, number of visible tiles, and pointer to their indices."""
    row = tile if SHARED else sequence * tiles + tile
    return tl.load(full + row), tl.load(visited + row), order + row * others


@triton.jit
def forward_tile(
    acc, m, norm, q, K, V, i, j, start, end, size, skj, svj, scale,
    D: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    START: tl.constexpr, END: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    k = rows(K, j, skj, size, D, BD, EVEN or not MASK)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # (BM, BN), base 2
    if MASK:
        seen = visible(i, j, start, end, size, START, END, WIDTH, ROWS, COLUMNS, EVEN, False)
        s = tl.where(seen, s, float("-inf"))
    new = tl.maximum(m, tl.max(s, 1))
    shift = new
    if MASK:  # a query that has seen no key yet
        shift = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(s - shift[:, None])
    keep = tl.exp2(m - shift)
    v = rows(V, j, svj, size, D, BD, EVEN or not MASK)
    acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision=PRECISION)
    return acc, new, norm * keep + tl.sum(p, 1)


@triton.jit
def forward(
    Q, K, V, OUT, L, start, end, full, visited, order, scale, size, heads, tiles, others,
    sqb, sqh, sqi, skb, skh, skj, svb, svh, svj, sob, soh, soi,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr,
    PLAIN: tl.constexpr, SHARED: tl.constexpr, START: tl.constexpr, END: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT (B, H, S, d) and L (B * H, S), the log-sum-exp in base 2. One program per query tile and head."""
    tile, bh = place(tiles)
    b, h = bh // heads, bh % heads
    Q, OUT = head_of(Q, b, h, sqb, sqh, D), head_of(OUT, b, h, sob, soh, D)
    K, V = head_of(K, b, h, skb, skh, D), head_of(V, b, h, svb, svh, D)
    if not SHARED:
        start, end = start + b * size, end + b * size
    i = tile * BM + tl.arange(0, BM)
    q = rows(Q, i, sqi, size, D, BD, EVEN)
    m, norm = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)
    if PLAIN:
        whole, visible_tiles = tile * BM // BN, tl.cdiv(tl.minimum((tile + 1) * BM, size), BN)
    else:
        whole, visible_tiles, order = counts(full, visited, order, b, tile, tiles, others, SHARED)
    for t in range(0, whole):
        n = t if PLAIN else tl.load(order + t)
        j = n * BN + tl.arange(0, BN)
        acc, m, norm = forward_tile(acc, m, norm, q, K, V, i, j, start, end, size, skj, svj, scale,
                                 D, BD, EVEN, False, PRECISION, START, END, WIDTH, ROWS, COLUMNS)  # fmt: skip
    for t in range(whole, visible_tiles):
        n = t if PLAIN else tl.load(order + t)
        j = n * BN + tl.arange(0, BN)
        acc, m, norm = forward_tile(acc, m, norm, q, K, V, i, j, start, end, size, skj, svj, scale,
                                 D, BD, EVEN, True, PRECISION, START, END, WIDTH, ROWS, COLUMNS)  # fmt: skip
    norm = tl.where(norm == 0.0, 1.0, norm)  # queries past the end
    store(OUT, i, soi, size, acc / norm[:, None], D, BD)
    tl.store(L + bh * size + i, m + tl.log2(norm), mask=i < size)


@triton.jit
def delta(
    OUT, G, Delta, size, heads, tiles, sob, soh, soi, sgb, sgh, sgi,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Delta (B * H, S): the product of a query's output and its gradient G, in fp32."""
    tile, bh = place(tiles)
    b, h = bh // heads, bh % heads
    i = tile * BM + tl.arange(0, BM)
    o = rows(head_of(OUT, b, h, sob, soh, D), i, soi, size, D, BD, EVEN).to(tl.float32)
    g = rows(head_of(G, b, h, sgb, sgh, D), i, sgi, size, D, BD, EVEN).to(tl.float32)
    tl.store(Delta + bh * size + i, tl.sum(o * g, 1), mask=i < size)


@triton.jit
def dq_tile(
    acc, q, g, lse, delta, K, V, i, j, start, end, size, skj, svj, scale,
    D: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    START: tl.constexpr, END: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    k = rows(K, j, skj, size, D, BD, EVEN or not MASK)
    v = rows(V, j, svj, size, D, BD, EVEN or not MASK)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    p = tl.exp2(s - lse[:, None])
    if MASK:
        p = tl.where(visible(i, j, start, end, size, START, END, WIDTH, ROWS, COLUMNS, EVEN, False), p, 0.0)
    ds = p * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)


@triton.jit
def backward_dq(
    Q, K, V, G, L, Delta, DQ, start, end, full, visited, order, scale, natural, size, heads, tiles, others,
    sqb, sqh, sqi, skb, skh, skj, svb, svh, svj, sgb, sgh, sgi, sdb, sdh, sdi,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr,
    PLAIN: tl.constexpr, SHARED: tl.constexpr, START: tl.constexpr, END: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """DQ (B, H, S, d). One program per query tile and head."""
    tile, bh = place(tiles)
    b, h = bh // heads, bh % heads
    Q, G, DQ = head_of(Q, b, h, sqb, sqh, D), head_of(G, b, h, sgb, sgh, D), head_of(DQ, b, h, sdb, sdh, D)
    K, V = head_of(K, b, h, skb, skh, D), head_of(V, b, h, svb, svh, D)
    if not SHARED:
        start, end = start + b * size, end + b * size
    i = tile * BM + tl.arange(0, BM)
    q, g = rows(Q, i, sqi, size, D, BD, EVEN), rows(G, i, sgi, size, D, BD, EVEN)
    lse = tl.load(L + bh * size + i, mask=i < size, other=float("inf"))
    delta = tl.load(Delta + bh * size + i, mask=i < size, other=0.0)
    acc = tl.zeros((BM, BD), tl.float32)
    if PLAIN:
        whole, visible_tiles = tile * BM // BN, tl.cdiv(tl.minimum((tile + 1) * BM, size), BN)
    else:
        whole, visible_tiles, order = counts(full, visited, order, b, tile, tiles, others, SHARED)
    for t in range(0, whole):
        n = t if PLAIN else tl.load(order + t)
        j = n * BN + tl.arange(0, BN)
        acc = dq_tile(acc, q, g, lse, delta, K, V, i, j, start, end, size, skj, svj, scale,
                      D, BD, EVEN, False, PRECISION, START, END, WIDTH, ROWS, COLUMNS)  # fmt: skip
    for t in range(whole, visible_tiles):
        n = t if PLAIN else tl.load(order + t)
        j = n * BN + tl.arange(0, BN)
        acc = dq_tile(acc, q, g, lse, delta, K, V, i, j, start, end, size, skj, svj, scale,
                      D, BD, EVEN, True, PRECISION, START, END, WIDTH, ROWS, COLUMNS)  # fmt: skip
    store(DQ, i, sdi, size, acc * natural, D, BD)


@triton.jit
def dkv_tile(
    dk, dv, k, v, Q, G, L, Delta, i, j, start, end, size, sqi, sgi, scale,
    D: tl.constexpr, BD: tl.constexpr, EVEN: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
    START: tl.constexpr, END: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    q = rows(Q, i, sqi, size, D, BD, EVEN)
    g = rows(G, i, sgi, size, D, BD, EVEN)
    # Past the end the weights are exp2(0 - inf) = 0; rows of keys past the end are not stored.
    lse = tl.load(L + i, mask=i < size, other=float("inf"))
    delta = tl.load(Delta + i, mask=i < size, other=0.0)
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - lse[None, :])  # (BN, BM)
    if MASK:
        p = tl.where(visible(i, j, start, end, size, START, END, WIDTH, ROWS, COLUMNS, EVEN, True), p, 0.0)
    dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION)
    ds = p * (tl.dot(v, tl.trans(g), input_precision=PRECISION) - delta[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION), dv


@triton.jit
def backward_dkv(
    Q, K, V, G, L, Delta, DK, DV, start, end, full, visited, order, scale, natural, size, heads, tiles, others,
    sqb, sqh, sqi, skb, skh, skj, svb, svh, svj, sgb, sgh, sgi, sdb, sdh, sdi, seb, seh, sei,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EVEN: tl.constexpr,
    PLAIN: tl.constexpr, SHARED: tl.constexpr, START: tl.constexpr, END: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """DK and DV (B, H, S, d). One program per key tile and head."""
    tile, bh = place(tiles)
    b, h = bh // heads, bh % heads
    Q, G = head_of(Q, b, h, sqb, sqh, D), head_of(G, b, h, sgb, sgh, D)
    K, V = head_of(K, b, h, skb, skh, D), head_of(V, b, h, svb, svh, D)
    DK, DV = head_of(DK, b, h, sdb, sdh, D), head_of(DV, b, h, seb, seh, D)
    L, Delta = L + bh * size, Delta + bh * size
    if not SHARED:
        start, end = start + b * size, end + b * size
    j = tile * BN + tl.arange(0, BN)
    k, v = rows(K, j, skj, size, D, BD, EVEN), rows(V, j, svj, size, D, BD, EVEN)
    dk, dv = tl.zeros((BN, BD), tl.float32), tl.zeros((BN, BD), tl.float32)
    if PLAIN:  # tiles on the diagonal are partly visible, those below it fully
        first, last = tile * BN // BM, tl.cdiv(size, BM)
        whole = tl.minimum(tl.cdiv(tile * BN + BN - 1, BM), last)
        for m in range(first, whole):
            i = m * BM + tl.arange(0, BM)
            dk, dv = dkv_tile(dk, dv, k, v, Q, G, L, Delta, i, j, start, end, size, sqi, sgi, scale,
                              D, BD, EVEN, True, PRECISION, START, END, WIDTH, ROWS, COLUMNS)  # fmt: skip
        for m in range(whole, last):
            i = m * BM + tl.arange(0, BM)
            dk, dv = dkv_tile(dk, dv, k, v, Q, G, L, Delta, i, j, start, end, size, sqi, sgi, scale,
                              D, BD, EVEN, False, PRECISION, START, END, WIDTH, ROWS, COLUMNS)  # fmt: skip
    else:
        whole, visible_tiles, order = counts(full, visited, order, b, tile, tiles, others, SHARED)
        for t in range(0, whole):
            i = tl.load(order + t) * BM + tl.arange(0, BM)
            dk, dv = dkv_tile(dk, dv, k, v, Q, G, L, Delta, i, j, start, end, size, sqi, sgi, scale,
                              D, BD, EVEN, False, PRECISION, START, END, WIDTH, ROWS, COLUMNS)  # fmt: skip
        for t in range(whole, visible_tiles):
            i = tl.load(order + t) * BM + tl.arange(0, BM)
            dk, dv = dkv_tile(dk, dv, k, v, Q, G, L, Delta, i, j, start, end, size, sqi, sgi, scale,
                              D, BD, EVEN, True, PRECISION, START, END, WIDTH, ROWS, COLUMNS)  # fmt: skip
    store(DK, j, sdi, size, dk * natural, D, BD)
    store(DV, j, sei, size, dv, D, BD)
