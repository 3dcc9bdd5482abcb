"""Compile every Triton kernel for GPUs that need not be there: ``python compile_kernels.py 80 90``.

Run as a script, without the interpreter; prints a line for each kernel and compute capability.
"""

from __future__ import annotations

import inspect
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qwen_longctx.ops.block_shares import _block_shares
from qwen_longctx.ops.choose import _best_blocks, _mean_logits, _mean_scores
from qwen_longctx.ops.columns import _columns
from qwen_longctx.ops.compact import _compact
from qwen_longctx.ops.decode import _decode, _join
from qwen_longctx.ops.eight_bit import _write
from qwen_longctx.ops.fetch import _fetch
from qwen_longctx.ops.fp8 import _rows
from qwen_longctx.ops.keep import _keep
from qwen_longctx.ops.means import _write_mean
from qwen_longctx.ops.merge import _merge
from qwen_longctx.ops.norm import _norm, _silu_mul
from qwen_longctx.ops.pages import _gathered
from qwen_longctx.ops.read_out import _read_out
from qwen_longctx.ops.rotate import _place, _rotate
from qwen_longctx.ops.row_lse import _row_lse
from qwen_longctx.ops.thin import _thin

TILE = {"HEAD_DIM": 128, "DIM": 128, "ROWS": 64, "KEYS": 64}
SCALES = ("scales", "s0", "s1", "s2")


def eight_bit(codes, bias=None):
    """Types of what a decoding step reads of a cache in 8 bits, of keys with a bias of some dtype or without one."""
    types = {"k": f"*{codes}", "v": f"*{codes}", "k_scales": "*fp32", "v_scales": "*fp32"}
    return types if bias is None else {**types, "bias": f"*{bias}", "frequencies": "*fp64"}


KERNELS = [
    (
        _gathered,
        {**dict.fromkeys(("pages", "keys", "values"), "*bf16"), "table": "*i32"},
        {"PAGE": 16, "HEAD_DIM": 128, "DIM": 128, "ROWS": 32},
    ),
    (_row_lse, {"q": "*bf16", "k": "*bf16", "limits": "*i32", "lse": "*fp32", "scale": "fp32"}, {**TILE, "ROWS": 128}),
    *(
        (
            _block_shares,
            {"q": "*bf16", "means": "*bf16", "limits": "*i32", "lse": "*fp32", "shares": "*fp32", "scale": "fp32"},
            {**TILE, "COLUMNS": 8, **sizes},
        )
        for sizes in (
            {"ROWS": 128, "PER_TILE": 8, "PER_BLOCK": 4, "STEPS": 1, "MEAN": False},
            {"ROWS": 128, "KEYS": 128, "PER_TILE": 128, "PER_BLOCK": 128, "STEPS": 1, "MEAN": True},
            {"ROWS": 128, "KEYS": 128, "PER_TILE": 128, "PER_BLOCK": 128, "STEPS": 4, "MEAN": False},
        )
    ),
    (
        _columns,
        {
            **{name: "*bf16" for name in ("q", "k", "v", "out")},
            **{"keep": "*u8", "lse": "*fp32", "scale": "fp32"},
        },
        TILE,
    ),
    (
        _merge,
        {
            **{f"o{i}": "*bf16" for i in range(4)},
            **{f"s{i}": "*fp32" for i in range(4)},
            **{"out": "*bf16", "lse": "*fp32"},
        },
        {"PARTS": 4, "HEAD_DIM": 128, "DIM": 128, "ROWS": 16},
    ),
    *(
        (
            _keep,
            {
                "scores": "*fp32",
                "kept": "*u8",
                **dict.fromkeys(("whole", "visible", "most", "near"), "*i32"),
                "amount": "*fp32",
            },
            {"MASS": mass, "LIMITED": limited, "BITS": 31, "WIDTH": 1024},
        )
        for mass in (False, True)
        for limited in (False, True)
    ),
    (
        _rotate,
        {"x": "*bf16", "cos": "*bf16", "sin": "*bf16", "out": "*bf16"},
        {"HALF": 64, "DIM": 64, "ROWS": 32},
    ),
    (
        _place,
        {**dict.fromkeys(("k", "v", "cos", "sin", "keys", "values"), "*bf16"), "slot": "*i64"},
        {"HALF": 64, "DIM": 64},
    ),
    *(
        (
            _decode,
            {
                **{name: f"*{dtype}" for name in ("q", "k", "v", "cos", "sin")},
                **{"ranges": "*i32", "heat": "*fp32", "sums": "*fp32", "lses": "*fp32", "scale": "fp32"},
                **held,
                "blocks": "*i32",
            },
            {
                **{"GROUP": 7, "HEAD_DIM": head_dim, "DIM": dim, "ROWS": rows, "KEYS": keys, "TILE": 64},
                **{"LISTED": listed, "BLOCK": 64, "PAGE": 64 if "table" in held else 0},
                **{name: None for name in ("k_scales", "v_scales", "bias", "frequencies", "table") if name not in held},
            },
        )
        for dtype, head_dim, dim, rows, keys, held, listed in (
            ("bf16", 128, 128, 16, 64, {}, 0),
            ("bf16", 128, 128, 16, 64, {"table": "*i32"}, 0),
            ("fp32", 256, 256, 16, 16, {}, 0),
            ("bf16", 128, 128, 16, 64, eight_bit("i8", "bf16"), 0),
            ("fp16", 80, 128, 64, 64, eight_bit("u8", "fp16"), 0),
            ("bf16", 128, 128, 16, 64, eight_bit("i8", "bf16"), 16),
        )
    ),
    *(
        (
            _read_out,
            {
                **{"codes": f"*{codes}", "scales": "*fp32", "out": f"*{dtype}", "spots": "*i32", "scaling": "fp32"},
                **({"bias": "*fp32", "frequencies": "*fp64"} if biased else {}),
            },
            {
                **{"HALF": half, "DIM": 64, "ROWS": 32},
                **({} if biased else dict.fromkeys(("spots", "bias", "frequencies"))),
            },
        )
        for codes, dtype, half, biased in (("i8", "bf16", 64, True), ("u8", "fp16", 40, False))
    ),
    (
        _join,
        {"sums": "*fp32", "lses": "*fp32", "out": "*bf16"},
        {"GROUP": 7, "HEAD_DIM": 128, "DIM": 128, "SPLITS": 66, "ROOM": 128},
    ),
    *(
        (
            _rows,
            {**dict.fromkeys(("x", "up"), "*bf16"), "values": "*fp8e4nv", "scales": "*fp32"},
            {"GATED": gated, "LEAST": 1e-30, "WIDTH": 4096, "PARTS": parts},
        )
        for gated, parts in ((False, 1), (True, 5), (True, 0))
    ),
    *(
        (
            _norm,
            {
                **dict.fromkeys(("x", "y", "weight", "total"), "*bf16"),
                **{"values": "*fp8e4nv" if cast else "*bf16", "scales": "*fp32", "epsilon": "fp32"},
            },
            {"ADDED": added, "CAST": cast, "LEAST": 1e-30, "ROWS": rows, "WIDTH": width},
        )
        for added, cast, rows, width in ((False, False, 32, 128), (True, False, 1, 4096), (True, True, 1, 4096))
    ),
    (_silu_mul, dict.fromkeys(("gate", "up", "out"), "*bf16"), {"WIDTH": 2048}),
    *(
        (
            _mean_logits,
            {
                **{name: f"*{dtype}" for name in ("q", "means", "cos", "sin")},
                **{"ranges": "*i32", "heat": "*fp32", "logits": "*fp32", "lses": "*fp32", "scale": "fp32"},
            },
            {**{"MEAN": 32, "GROUP": 7, "HEAD_DIM": head_dim, "DIM": dim}, **{"ROWS": rows, "MEANS": 64}},
        )
        for dtype, head_dim, dim, rows in (("bf16", 128, 128, 16), ("bf16", 80, 128, 32), ("fp32", 256, 256, 16))
    ),
    *(
        (
            _mean_scores,
            {"logits": "*fp32", "lses": "*fp32", "ranges": "*i32", "scores": "*fp32"},
            {
                **{"GROUP": 7, "ROOM": room, "PARTS": 128, "TILE": 64, "BLOCKS": blocks, "PER_BLOCK": 2},
                **{"BLOCK": 64, "ALWAYS": 2.0},
            },
        )
        for room, blocks in ((8, 256), (64, 64))
    ),
    (_best_blocks, {"scores": "*fp32", "ranges": "*i32", "chosen": "*i32"}, {"BLOCK": 64, "WIDTH": 8192}),
    *(
        (
            _write,
            {
                **{"k": f"*{dtype}", "v": f"*{dtype}", "spots": f"*{spots}", "slot": "*i64"},
                **{"vector": "*fp32", "turns": "*fp64", "k_codes": f"*{codes}", "v_codes": f"*{codes}"},
                **{"k_scales": "*fp32", "v_scales": "*fp32", "held_spots": "*i32"},
            },
            {**{"HEAD_DIM": head_dim, "DIM": 128, "SCALING": 1.0}, **dict.fromkeys(absent)},
        )
        for dtype, head_dim, spots, codes, absent in (
            ("bf16", 128, "i32", "i8", ()),
            ("fp16", 80, "i64", "u8", ("slot", "vector", "turns")),
        )
    ),
    *(
        (
            _write_mean,
            {"k": f"*{k}", "spots": "*i32", "slot": "*i64", "means": "*bf16"}
            | {"scales": "*fp32", "vector": "*fp32", "turns": "*fp64"},
            {**{"SIZE": 32, "KEYS": keys, "HEAD_DIM": 128, "DIM": 128, "SCALING": 1.0}, **dict.fromkeys(absent)},
        )
        for k, keys, absent in (
            ("bf16", 32, ("scales", "spots", "vector", "turns")),
            ("u8", 1, ()),
        )
    ),
    *(
        (
            _thin,
            {
                **{name: f"*{dtype}" for name in ("x", "w0", "w1", "w2")},
                **{name: "*bf16" for name in ("b0", "b1", "b2", "o0", "o1", "o2")},
                **dict.fromkeys(scales, "*fp32"),
            },
            {**{"GATED": gated, "OUTPUTS": 16, "DEPTH": 256, "ROWS": 16}, **dict.fromkeys(none)},
        )
        for dtype, scales, none, gated in (("bf16", (), SCALES, True), ("fp8e4nv", SCALES, (), False))
    ),
    (
        _fetch,
        {"places": "*i64", "blocks": "*i32", "target": "*bf16"},
        {"UNIT": 256, "BLOCK": 64, "HEAD_DIM": 128, "DIM": 128},
    ),
    (_compact, {"mask": "*u8", "counts": "*i32", "indices": "*i32"}, {"WIDTH": 1024}),
]


def source(kernel, types, constants):
    """What the compiler takes: names of arguments with their types, numbers are ``i32``, and constants."""
    names = kernel.arg_names
    signature = {name: types.get(name, "i32") for name in names if name not in constants}
    if "constexprs" not in inspect.signature(ASTSource).parameters:  # before Triton 3.3
        return ASTSource(kernel, signature, constants)
    signature = {name: signature.get(name, "constexpr") for name in names}
    return ASTSource(kernel, signature, constexprs={(names.index(name),): value for name, value in constants.items()})


capabilities = [int(one) for one in sys.argv[1:]]
for capability in capabilities:
    seen = set()
    for kernel, types, constants in KERNELS:
        if (kernel is _rows or constants.get("CAST")) and capability < 89:
            continue  # devices without 8 bits do not run it
        if capability != capabilities[-1] and kernel in seen:
            continue  # further variants for the last device alone: they take their time
        seen.add(kernel)
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source(kernel, types, constants), target=target, options={"num_warps": 4})
        print(f"{kernel.__name__} {capability} {len(compiled.asm['cubin'])} bytes")
