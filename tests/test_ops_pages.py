"""Keys and values copied out of pages, bit for bit: by PyTorch, by the kernel in Triton's interpreter, and on a GPU."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers import DEVICES, INTERPRETED
from launches import NEEDS_RULES, _Launcher
from qwen_longctx.ops import pages as ops_pages
from qwen_longctx.ops.pages import gathered, gathered_triton

WAYS = ["twin", pytest.param("kernel", marks=INTERPRETED), pytest.param("cuda", marks=pytest.mark.gpu)]
ON = [pytest.param("cpu", marks=INTERPRETED), pytest.param("cuda", marks=pytest.mark.gpu)]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HEADS_FIRST, TOKENS_FIRST = (0, 1, 2, 3), (0, 2, 1, 3)  # the two orders of vLLM
LAST = 2**31 - 1


def laid(shape, order, dtype, device="cpu"):
    """Random bits, NaN of all kinds among them, that lie in memory in an order of their dimensions."""
    itemsize = dtype.itemsize
    drawn = torch.randint(0, 256, (*(shape[dim] for dim in order), itemsize), dtype=torch.uint8)
    return drawn.view(dtype).squeeze(-1).permute([order.index(dim) for dim in range(4)]).to(device)


def listed(pool, used, spare, shared, device="cpu"):
    """A row of a block table: pages of a pool, some more than once if shared, and what is no page behind them."""
    drawn = torch.randint(0, pool, (used,)) if shared else torch.randperm(pool)[:used]
    unused = torch.tensor([-1, LAST]).repeat(spare)[:spare]
    row = torch.cat((drawn, unused)).int()
    return torch.stack((torch.full_like(row, LAST), row)).to(device)[1]


def by_indexing(pages, table, length):
    """Every token looked up in its page."""
    token = torch.arange(length, device=pages.device)
    page_size = pages.shape[2]
    found = pages[table.long()[token // page_size], :, token % page_size]
    return tuple(x[None] for x in found.chunk(2, dim=-1))


def check(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype and one.is_contiguous()
        bits = BITS[one.element_size()]
        assert torch.equal(one.view(bits), other.contiguous().view(bits))


def run(way):
    return gathered_triton if way == "kernel" else gathered


@st.composite
def cases(draw):
    page_size = draw(st.sampled_from([8, 16, 32, 64, 96, 100, 128, 256, 1024]))
    whole, part = draw(st.integers(0, min(4, 512 // page_size))), draw(st.integers(0, min(page_size, 300)))
    return {
        "length": whole * page_size + part,
        "page_size": page_size,
        "heads": draw(st.integers(1, 5)),
        "head_dim": 8 * draw(st.integers(2, 32)),
        "order": draw(st.sampled_from([HEADS_FIRST, TOKENS_FIRST, *permutations(range(4))])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "shared": draw(st.booleans()),
        "spare": draw(st.integers(0, 3)),
    }


def case(length, page_size, heads, head_dim, order, **more):
    names = ("length", "page_size", "heads", "head_dim", "order")
    sizes = dict(zip(names, (length, page_size, heads, head_dim, order), strict=True))
    return {**sizes, "dtype": torch.bfloat16, "shared": False, "spare": 2, **more}


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=30)
@given(cases())
@example(case(0, 16, 4, 128, TOKENS_FIRST))
@example(case(1, 16, 4, 128, HEADS_FIRST))
@example(case(160, 16, 4, 128, TOKENS_FIRST, spare=0))
@example(case(161, 16, 4, 128, HEADS_FIRST, shared=True))
@example(case(1029, 1024, 2, 64, TOKENS_FIRST))
@example(case(2047, 1024, 1, 16, HEADS_FIRST, dtype=torch.float16))
@example(case(50, 16, 3, 256, TOKENS_FIRST, dtype=torch.float32))
@example(case(41, 4, 2, 3, HEADS_FIRST))
def test_tokens_are_those_of_their_pages(way, case):
    """Of any size, in any order in memory, whatever the table holds beyond them."""
    device = "cuda" if way == "cuda" else "cpu"
    length, page_size = case["length"], case["page_size"]
    used = -(-length // page_size)
    pages = laid((used + 2, case["heads"], page_size, 2 * case["head_dim"]), case["order"], case["dtype"], device)
    table = listed(used + 2, used, case["spare"], case["shared"], device)
    check(run(way)(pages, table, length), by_indexing(pages, table, length))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("order", [HEADS_FIRST, TOKENS_FIRST])
def test_views_are_read_where_they_lie(way, order):
    """Pages of one layer out of those of all, some of their heads, a table of any stride, of either kind of numbers."""
    device = "cuda" if way == "cuda" else "cpu"
    pages = laid((3 * 9, 6, 16, 64), order, torch.bfloat16, device).unflatten(0, (9, 3))[:, 1, 2:5]
    table = torch.stack((torch.full((7,), LAST), torch.randperm(9)[:7]), 1).to(device)[:, 1]
    for one in (table, table.int(), table.int()[:6]):
        check(run(way)(pages, one, 90), by_indexing(pages, one, 90))


@pytest.mark.parametrize("way", WAYS)
def test_what_no_token_owns_stays_where_it_is(way):
    """NaN in the rest of the last page and in pages of others does not come out."""
    device = "cuda" if way == "cuda" else "cpu"
    pages = torch.full((6, 16, 2, 48), torch.nan, device=device).transpose(1, 2)
    table = torch.tensor([4, 1, 3, -1, LAST], dtype=torch.int32, device=device)
    for page, tokens in ((4, 16), (1, 16), (3, 5)):
        pages[page, :, :tokens] = torch.randn(2, tokens, 48, device=device)
    keys, values = run(way)(pages, table, 37)
    assert keys.isfinite().all() and values.isfinite().all()
    check((keys, values), by_indexing(pages, table, 37))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 0, 2, 3), (2, 0, 1, 3), (3, 0, 1, 2)])
def test_offsets_beyond_31_bits(way, order):
    """A page, a head, a token or a number of a head that lies far off; of the memory between little is touched."""
    device = "cuda" if way == "cuda" else "cpu"
    shape = (3, 3, 3, 6)
    far = {0: 2**30, 1: 2**30, 2: 2**30, 3: 2**31 // 3}[order[0]] + 16  # values begin 3 numbers behind keys
    strides = [0] * 4
    for dim, step in zip(order, (far, 64, 18, 1), strict=True):
        strides[dim] = step
    size = 1 + sum((count - 1) * step for count, step in zip(shape, strides, strict=True))
    pages = torch.empty(size, dtype=torch.bfloat16, device=device).as_strided(shape, strides)
    pages.copy_(torch.randn(shape))
    table = torch.tensor([2, 0, 1], dtype=torch.int32, device=device)
    check(run(way)(pages, table, 8), by_indexing(pages, table, 8))


@pytest.mark.gpu
def test_results_beyond_31_bits():
    """More numbers of keys than an offset of 32 bits reaches."""
    length = 2**22 + 5
    if torch.cuda.mem_get_info()[0] < 10 << 30:
        pytest.skip("needs 10 GiB of free memory")
    pages = torch.randn(5, 64, 4, 256, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
    table = torch.randint(0, 5, (-(-length // 64),), dtype=torch.int32, device="cuda")
    found = gathered(pages, table, length)
    for start in (0, 2**21, length - 300):
        own = table[start // 64 :]
        skipped = start % 64
        wanted = by_indexing(pages, own, skipped + 300)
        check([x[:, start : start + 300] for x in found], [x[:, skipped:] for x in wanted])


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_that_triton_does_not_take(device):
    pages = laid((5, 2, 16, 32), TOKENS_FIRST, torch.float64, device)
    table = listed(5, 4, 1, False, device)
    check(gathered(pages, table, 50), by_indexing(pages, table, 50))


class Counted:
    """A kernel, and the grids of its launches."""

    def __init__(self, kernel):
        self.kernel, self.grids = kernel, []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return self.kernel[grid]


@INTERPRETED
def test_where_triton_runs_one_launch_does_it(monkeypatch):
    """Through the name that the plugin for vLLM knows; no tokens are no launch."""
    kernel = Counted(ops_pages._gathered)
    monkeypatch.setattr(ops_pages, "uses_triton", lambda *x: True)
    monkeypatch.setattr(ops_pages, "_gathered", kernel)
    pages, table = laid((5, 2, 16, 32), TOKENS_FIRST, torch.bfloat16), listed(5, 3, 1, False)
    assert [x.shape for x in gathered(pages, table, 0)] == [(1, 0, 2, 16)] * 2
    assert kernel.grids == []
    check(gathered(pages, table, 40), by_indexing(pages, table, 40))
    assert len(kernel.grids) == 1


@NEEDS_RULES
def test_a_sequence_that_grows_compiles_nothing(monkeypatch):
    """Nor does a row of the table at another address."""
    variants = []
    monkeypatch.setattr(ops_pages, "_gathered", _Launcher(ops_pages._gathered, variants))
    pages = laid((5, 2, 16, 256), TOKENS_FIRST, torch.bfloat16)
    tables = torch.zeros(8, 21, dtype=torch.int32)
    for row, length in enumerate((1, 2, 15, 16, 17, 160, 256, 333)):
        gathered_triton(pages, tables[row], length)
    assert len(variants) == 8 and len(set(variants)) == 1
