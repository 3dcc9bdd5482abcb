"""Which variants of the Triton kernels a run launches, without a GPU: PyTorch computes, and the launches are noted.

Triton compiles a kernel anew for each combination of dtypes, constants, and what it knows of the other arguments: for
numbers whether they are 1 or divisible by 16, for tensors whether their address is. The rule is Triton's own, for a
GPU of compute capability 9.0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from unittest import mock

import pytest
from packaging.version import Version

from qwen_longctx.geometry.tiles import Tiles
from qwen_longctx.ops import (
    block_shares,
    choose,
    columns,
    compact,
    decode,
    eight_bit,
    keep,
    means,
    merge,
    norm,
    read_out,
    rotate,
    row_lse,
    thin,
    triton_runtime,
)


def _kept(scores, whole, visible, amount, **how):
    return keep.keep(scores, Tiles(whole, whole, whole, visible, 1, scores.shape[3], 0), amount, **how)


# the module of an operation, its launcher, the kernels that this launches, and the PyTorch function that does the same
OPERATIONS = (
    (
        norm,
        "rms_norm_triton",
        ("_norm",),
        lambda x, *_, **how: (x, norm.Rows(x, x[..., :1]) if how.get("to_8_bits") else x),
    ),
    (norm, "silu_mul_triton", ("_silu_mul",), lambda gate, up: gate),
    (rotate, "rotate_triton", ("_rotate",), rotate.rotate),
    (rotate, "place_triton", ("_place",), rotate.place),
    (merge, "merge_triton", ("_merge",), merge.merge),
    (row_lse, "row_lse_triton", ("_row_lse",), row_lse.row_lse),
    (block_shares, "block_shares_triton", ("_block_shares",), block_shares.block_shares),
    (keep, "keep_triton", ("_keep",), _kept),
    (compact, "compact_triton", ("_compact",), lambda mask: compact.compact(mask, 1)[:2]),
    (columns, "columns_triton", ("_columns",), columns.columns),
    (read_out, "read_out_triton", ("_read_out",), read_out.read_out),
    (choose, "choose_triton", ("_mean_logits", "_mean_scores", "_best_blocks"), choose.choose),
    (decode, "decode_triton", ("_decode", "_join"), decode.decode),
    (eight_bit, "write_triton", ("_write",), eight_bit.write),
    (means, "write_mean_triton", ("_write_mean",), means.write_mean),
    (thin, "linear_triton", ("_thin",), thin.linear),
    (thin, "silu_mul_triton", (), thin.silu_mul),
)
Variant = tuple[str, str]


def _rules():
    if not triton_runtime.AVAILABLE:
        return "needs Triton"
    if Version(triton_runtime.triton.__version__) < Version("3.3"):
        return "Triton before 3.3 decides in another way what it compiles anew"
    try:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.jit import create_function_from_signature  # noqa: F401

        make_backend(GPUTarget("cuda", 90, 32))
    except Exception as error:  # a Triton that decides in another way
        return f"Triton does not tell its variants: {error}"
    return ""


WHY_NOT = _rules()
NEEDS_RULES = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "never")


@cache
def _variant_of(kernel):
    """Triton's own function from the arguments of a launch to what it compiles for."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    if not isinstance(kernel, JITFunction):  # of the interpreter
        kernel = JITFunction(kernel.fn, do_not_specialize=kernel.kwargs["do_not_specialize"])
    return create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))


class _Launcher:
    """Stands in place of a kernel: notes launches and computes nothing."""

    def __init__(self, kernel, variants: list[Variant]) -> None:
        self.kernel, self.variants = kernel, variants

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            _, special, options = _variant_of(self.kernel)(*args, **kwargs)
            self.variants.append((self.kernel.__name__, f"{special} {options}"))

        return launch


@contextmanager
def recorded() -> Iterator[list[Variant]]:
    """The launches inside the block, in order: name of the kernel, and what it was compiled for."""
    variants: list[Variant] = []
    computing: list[str] = []

    def uses_triton(*tensors):
        return not computing

    def noted(launch, twin):
        @wraps(launch)
        def both(*args, **kwargs):
            launch(*args, **kwargs)
            computing.append(launch.__name__)
            try:
                return twin(*args, **kwargs)
            finally:
                computing.pop()

        return both

    with ExitStack() as stack:
        for module, launcher, kernels, twin in OPERATIONS:
            stack.enter_context(mock.patch.object(module, "uses_triton", uses_triton))
            for kernel in kernels:
                stand_in = _Launcher(getattr(module, kernel), variants)
                stack.enter_context(mock.patch.object(module, kernel, stand_in))
            stack.enter_context(mock.patch.object(module, launcher, noted(getattr(module, launcher), twin)))
        stack.enter_context(mock.patch.object(thin, "capability", lambda device: (9, 0)))
        stack.enter_context(mock.patch.object(decode, "older_than", lambda device, needed: ""))
        yield variants
