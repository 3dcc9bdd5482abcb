"""Every Triton kernel against its PyTorch twin: through Triton's interpreter on the CPU, for real on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version

import qwen_longctx
from helpers import INTERPRETED
from qwen_longctx.geometry.positions import Span
from qwen_longctx.geometry.rotary import rotation
from qwen_longctx.geometry.tiles import Tiles
from qwen_longctx.ops.block_shares import block_shares, block_shares_triton
from qwen_longctx.ops.columns import columns, columns_triton
from qwen_longctx.ops.compact import compact, compact_triton
from qwen_longctx.ops.keep import keep, keep_triton
from qwen_longctx.ops.merge import merge, merge_triton
from qwen_longctx.ops.rotate import place, place_triton, rotate, rotate_triton
from qwen_longctx.ops.row_lse import row_lse, row_lse_triton

triton = pytest.importorskip("triton", reason="needs Triton")
DEVICES = [pytest.param("cpu", marks=INTERPRETED), pytest.param("cuda", marks=pytest.mark.gpu)]
KERNELS = (
    *("compact", "keep", "row_lse", "block_shares", "columns", "rotate", "merge", "decode", "join"),
    *("mean_logits", "mean_scores", "best_blocks", "thin", "read_out", "norm", "silu_mul", "place"),
    *("write", "write_mean", "fetch", "gathered"),
)
NEWER = ("rows",)  # kernels that need compute capability 8.9
HEADS = [(4, 2), (6, 1), (3, 3)]
on_devices = pytest.mark.parametrize("device", DEVICES)


def draw(device, *shape, dtype=torch.float32):
    return torch.randn(shape).to(device=device, dtype=dtype)


def on_cpu(function, *args, **kwargs):
    """The PyTorch twin, on the CPU."""
    moved = [a.cpu() if isinstance(a, torch.Tensor) else a for a in args]
    return function(*moved, **kwargs)


def close(result, wanted, tolerance=1e-5):
    torch.testing.assert_close(result.cpu().float(), wanted.float(), atol=tolerance, rtol=tolerance)


@on_devices
@pytest.mark.parametrize("shape", [(1, 2, 3, 5), (2, 1, 4, 1030), (1, 3, 2, 64)])
def test_compact(device, shape):
    mask = torch.rand(shape, device=device) < 0.3
    mask[0, 0, 0] = False
    mask[0, 0, 1] = True
    counts, indices = compact_triton(mask)
    wanted = on_cpu(compact, mask, 128)
    assert torch.equal(counts.cpu(), wanted.counts)
    listed = torch.arange(shape[-1]) < wanted.counts[..., None]
    assert torch.equal(indices.cpu()[listed], wanted.indices[listed])
    assert int(indices.min()) >= 0 and int(indices.max()) < shape[-1]


@on_devices
@pytest.mark.parametrize("by", ["mass", "threshold"])
@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("start", [0, 40, 41, 75, 40000])
def test_keep(device, by, limited, start):
    tiles = Tiles.of(Span(start, start + 30, ()), 8, torch.device(device))
    scores = torch.rand(2, 3, len(tiles.starts), tiles.blocks, device=device) ** 4
    scores[0, 0, 0] = 0.0
    shape = (3, len(tiles.starts))
    amount, most = torch.rand(shape, device=device), torch.randint(0, 9, shape, dtype=torch.int32, device=device)
    amount[1:] = float(by == "mass")
    most[2] = 10_000
    limits = (most, most.cpu()) if limited else (None, None)
    window = torch.arange(shape[1], dtype=torch.int32, device=device) % 3
    result = keep_triton(scores, tiles.whole, tiles.visible, amount, by=by, most=limits[0], sink=1, window=window)
    on = Tiles(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in tiles))
    wanted = keep(scores.cpu(), on, amount.cpu(), by=by, most=limits[1], sink=1, window=window.cpu())
    assert torch.equal(result.cpu(), wanted)
    assert torch.equal(result[:, 2].cpu(), on.sees().expand(2, -1, -1))


@on_devices
@pytest.mark.parametrize(
    ("keys", "heads"), [*((keys, heads) for keys in (0, 1, 130) for heads in HEADS), (9000, HEADS[2])]
)
def test_row_lse(device, heads, keys):
    q, k = draw(device, 2, 70, heads[0], 24), draw(device, 2, keys, heads[1], 24)
    limits = torch.randint(0, keys + 1, (70,), device=device)
    limits[:2] = torch.tensor([0, keys])
    close(row_lse_triton(q, k, limits, scale=0.3), on_cpu(row_lse, q, k, limits, scale=0.3))


@on_devices
@pytest.mark.parametrize("pool", ["max", "mean"])
@pytest.mark.parametrize(
    ("rows", "per_block", "heads"),
    [*((*size, heads) for size in ((16, 4), (4, 2), (64, 1), (128, 128)) for heads in HEADS), (256, 256, HEADS[0])],
)
def test_block_shares(device, heads, rows, per_block, pool):
    """Tiles and blocks of any power of two, also larger than one program takes."""
    keys = 83 + 2 * (per_block if per_block > 64 else 0)
    q, means = draw(device, 2, 3 * rows, heads[0], 24), draw(device, 2, keys, heads[1], 24)
    limits = torch.tensor([0, 40, keys], device=device).repeat_interleave(rows)
    lse = row_lse(q.cpu(), means.cpu(), limits.cpu(), scale=0.3).to(device)
    how = {"rows": rows, "per_block": per_block, "scale": 0.3, "pool": pool}
    out = torch.zeros(2, heads[0], 3, -(-keys // per_block) + 5, device=device)
    wanted = out.cpu()
    block_shares_triton(q, means, lse, limits, out, 2, **how)
    block_shares(*(x.cpu() for x in (q, means, lse, limits)), wanted, 2, **how)
    close(out, wanted)
    assert wanted[..., 2:-3].any() and not out[..., :2].any() and not out[..., -3:].any()


@on_devices
def test_block_shares_of_more_keys_than_a_program_takes(device):
    q, means = draw(device, 1, 12, 2, 16), draw(device, 1, 1150, 1, 16)
    limits = torch.tensor([1150, 520, -3], device=device).repeat_interleave(4)
    lse = row_lse(q.cpu(), means.cpu(), limits.cpu(), scale=0.3).to(device)
    out = torch.zeros(1, 2, 3, 288, device=device)
    wanted, how = out.cpu(), {"rows": 4, "per_block": 4, "scale": 0.3}
    block_shares_triton(q, means, lse, limits, out, **how)
    block_shares(*(x.cpu() for x in (q, means, lse, limits)), wanted, **how)
    close(out, wanted)


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("count", [1, 90])
def test_columns(device, dtype, count):
    q = draw(device, 2, 70, 4, 24, dtype=dtype)
    k, v = draw(device, 2, 4, count, 24, dtype=dtype), draw(device, 2, 4, count, 24, dtype=dtype)
    keep_columns = torch.rand(2, 4, 3, count, device=device) < 0.5
    keep_columns[0, 0, 0] = False
    out, lse = columns_triton(q, k, v, keep_columns, size=32, scale=0.3)
    wanted_out, wanted_lse = on_cpu(columns, q.float(), k.float(), v.float(), keep_columns, size=32, scale=0.3)
    close(out, wanted_out, 1e-5 if dtype == torch.float32 else 2e-2)
    close(lse, wanted_lse, 1e-5 if dtype == torch.float32 else 1e-3)
    assert not out[0, :32, 0].any() and bool((lse[0, 0, :32] == -torch.inf).all())


@on_devices
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("tokens", [1, 70])
def test_rotate(device, rows, tokens):
    """One table for all tokens or one a token, for all rows or each; queries as a view of a projection."""
    x = draw(device, 2, 70, 3 * 24).unflatten(2, (3, 24))
    inv_freq = 10000 ** -(torch.arange(0, 24, 2, device=device) / 24)
    table = rotation(torch.randint(0, 500, (rows, tokens), device=device), inv_freq, 1.1, torch.float32)
    close(rotate_triton(x, *table), on_cpu(rotate, x, *table))


@on_devices
@pytest.mark.parametrize("count", [2, 3, 4])
def test_merge(device, count):
    outs = [draw(device, 2, 4, 70, 24).transpose(1, 2) for _ in range(count)]
    lses = [draw(device, 2, 4, 70) for _ in range(count)]
    for lse in lses:
        lse[0, 0, :3] = -torch.inf
    lses[0][1] = -torch.inf
    for out in outs:
        out[0, :3, 0] = 0
    out, lse = merge_triton(list(zip(outs, lses, strict=True)))
    wanted = merge([(o.cpu(), s.cpu()) for o, s in zip(outs, lses, strict=True)])
    close(out, wanted[0])
    close(lse, wanted[1])


@on_devices
@pytest.mark.parametrize("head_dim", [16, 80])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_key_is_rotated_to_its_place(device, head_dim, rows):
    torch.manual_seed(0)
    k, v = (draw(device, 3, 1, 6 * head_dim).view(3, 1, 6, head_dim)[:, :, ::2] for _ in range(2))
    table = rotation(
        torch.randint(0, 1000, (rows, 1), device=device),
        1 / (1 + torch.arange(head_dim // 2, device=device)),
        1.0,
        torch.float32,
    )
    slot = torch.tensor([4], device=device)
    found, wanted = ((draw(device, 3, 7, 3, head_dim), draw(device, 3, 7, 3, head_dim)) for _ in range(2))
    for one, other in zip(found, wanted, strict=True):
        other.copy_(one)
    place_triton(k, v, *table, found, slot)
    place(*(x.cpu() for x in (k, v, *table)), (cpu := tuple(x.cpu() for x in wanted)), slot.cpu())
    for one, other in zip(found, cpu, strict=True):
        torch.testing.assert_close(one.cpu(), other)


@pytest.mark.filterwarnings("ignore")
def test_every_kernel_compiles_for_gpus(tmp_path):
    """The interpreter accepts what the compiler refuses; the compiler needs no GPU."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(qwen_longctx.__file__).parents[1])}
    # the oldest Triton knows least, and its lane has time for both
    archs = ("90",) if Version(triton.__version__) >= Version("3.3") else ("80", "90")
    done = subprocess.run(
        [sys.executable, str(script), *archs],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = {tuple(line.split()[:2]) for line in done.stdout.splitlines()}
    wanted = {(f"_{name}", arch) for name in KERNELS for arch in archs}
    assert compiled == wanted | {(f"_{name}", "90") for name in NEWER}
