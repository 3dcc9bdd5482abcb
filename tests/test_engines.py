"""The registry of attention engines: which one runs where, what it refuses, and what importing it brings along."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import qwen_longctx
from qwen_longctx import ops
from qwen_longctx.errors import InvalidType, InvalidValue, Unsupported
from qwen_longctx.ops import device as devices
from qwen_longctx.ops import engines, fa4, triton_runtime
from qwen_longctx.ops.block_shares import block_shares
from qwen_longctx.ops.columns import columns
from qwen_longctx.ops.compact import BlockLists, compact
from qwen_longctx.ops.merge import merge
from qwen_longctx.ops.row_lse import row_lse

ROOT = Path(qwen_longctx.__file__).parents[1]
CUDA = torch.device("cuda", 0)
HALF = [torch.float16, torch.bfloat16]
BELOW_8 = [(6, 1), (7, 0), (7, 5)]
FROM_8_ON = [(8, 0), (8, 6), (8, 9)]
FROM_9_ON = [(9, 0), (10, 0), (12, 0)]


@pytest.fixture
def capability(monkeypatch):
    """Pretend that there is a CUDA device of a compute capability, with cuDNN and flash-attn-4 installed."""

    def pretend(version):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: version)
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        monkeypatch.setattr(fa4, "_missing", lambda: "")
        forget()

    def forget():
        engines._dense.cache_clear()
        devices.capability.cache_clear()

    yield pretend
    forget()


def dense_engine(dtype, tokens=4096, head_dim=128, device=CUDA):
    return engines.dense(SimpleNamespace(device=device, dtype=dtype, shape=(1, tokens, 28, head_dim))).name


# --- which engine runs where --------------------------------------------------------------------------------------


def test_rows_of_the_registry():
    assert [name for name, row in ops.ENGINES.items() if row.name != name] == []
    assert [row.name for row in ops.ENGINES.values() if row.takes_lists] == ["fa4", "flex", "reference"]
    assert [row.name for row in ops.ENGINES.values() if not row.differentiable] == ["fa4", "flex"]
    for device in ("cpu", "cuda", "mps", "meta"):
        assert ops.ENGINES["reference"].why_not(torch.device(device), torch.float64, 3, 1) == ""


@pytest.mark.parametrize("version", BELOW_8)
@pytest.mark.parametrize("tokens", [1, 255, 4096])
@pytest.mark.parametrize("head_dim", [64, 128, 80])
def test_no_flash_attention_below_8(version, tokens, head_dim, capability):
    capability(version)
    assert dense_engine(torch.float16, tokens, head_dim) == "efficient"
    assert dense_engine(torch.bfloat16, tokens, head_dim) == "reference"  # these devices have no bfloat16
    assert dense_engine(torch.float32, tokens, head_dim) == "efficient"
    for dtype in HALF:
        for name, needed in (("fa4", "9.0"), ("flex", "8.0")):
            reason = f"needs compute capability {needed}, this device has {version[0]}.{version[1]}"
            assert ops.why_not(CUDA, dtype, head_dim, 128)[name] == reason
            with pytest.raises(InvalidValue, match=f'kernel="{name}" {reason}'):
                ops.list_kernel(name, CUDA, dtype, head_dim, 128)
        assert ops.list_kernel("auto", CUDA, dtype, head_dim, 128) == "reference"


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("version", FROM_8_ON)
def test_flash_attention_and_flex_from_8_on(version, dtype, capability):
    capability(version)
    for tokens in (1, 4096):
        assert dense_engine(dtype, tokens) == "flash"
    assert dense_engine(dtype, head_dim=20) == dense_engine(dtype, head_dim=320) == "efficient"
    assert ops.list_kernel("auto", CUDA, dtype, 128, 128) == "flex"
    assert "9.0" in ops.why_not(CUDA, dtype, 128, 128)["fa4"]  # it would ignore the lists


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("version", FROM_9_ON)
def test_cudnn_and_flash_attention_4_from_9_on(version, dtype, capability):
    capability(version)
    assert [dense_engine(dtype, tokens) for tokens in (1, 255, 256, 4096)] == ["flash", "flash", "cudnn", "cudnn"]
    assert dense_engine(dtype, head_dim=96) == "flash"
    assert ops.list_kernel("auto", CUDA, dtype, 128, 128) == "fa4"
    assert ops.list_kernel("auto", CUDA, dtype, 128, 256) == ops.list_kernel("auto", CUDA, dtype, 96, 128) == "flex"


@pytest.mark.parametrize("version", BELOW_8 + FROM_8_ON)
def test_head_dims_that_are_not_aligned(version, capability):
    """No fused kernel reads rows that begin anywhere."""
    capability(version)
    for dtype in (torch.float16, torch.float32):
        for head_dim in range(1, 40):
            engine = "reference" if head_dim % 4 else "efficient"
            if dtype == torch.float16 and version >= (8, 0) and head_dim % 8 == 0:
                engine = "flash"
            assert dense_engine(dtype, head_dim=head_dim) == engine


@pytest.mark.parametrize(
    ("version", "least"),
    [((6, 1), ()), ((7, 0), (torch.float16, torch.float32)), ((7, 5), (torch.float16, torch.float32))],
)
def test_triton_where_it_knows_device_and_dtype(version, least, capability, monkeypatch):
    """Beside the engines of attention: merging, rotating, selecting, and norms."""
    monkeypatch.setattr(triton_runtime, "AVAILABLE", True)

    def runs(*dtypes):
        return devices.uses_triton(
            *(SimpleNamespace(is_cuda=True, device=CUDA, dtype=dtype, requires_grad=False) for dtype in dtypes)
        )

    capability(version)
    assert [dtype for dtype in (*HALF, torch.float32, torch.float64) if runs(dtype)] == list(least)
    assert not runs(torch.float32, torch.bfloat16) and not runs(torch.bfloat16, torch.float32)
    for newer in FROM_8_ON:
        capability(newer)
        assert [dtype for dtype in (*HALF, torch.float32, torch.float64) if runs(dtype)] == [*HALF, torch.float32]


def test_other_devices_and_dtypes(capability):
    capability((9, 0))
    cpu = torch.device("cpu")
    assert {dense_engine(d, device=cpu) for d in (*HALF, torch.float32, torch.float64)} == {"cpu"}
    assert dense_engine(torch.float32) == "efficient"
    assert dense_engine(torch.float64) == dense_engine(torch.float32, device=torch.device("mps")) == "reference"
    assert ops.list_kernel("auto", CUDA, torch.float64, 128, 128) == "reference"


@pytest.mark.parametrize("setting", ["sdpa", "cudnn", "fast"])
def test_what_takes_no_lists_is_refused(setting):
    with pytest.raises(InvalidValue, match=f'kernel="{setting}" takes no block lists'):
        ops.list_kernel(setting, torch.device("cpu"), torch.float32, 64, 64)


# --- what calls refuse --------------------------------------------------------------------------------------------


def lists(queries=64, keys=64, size=32, heads=4):
    return compact(torch.ones(1, heads, -(-queries // size), -(-keys // size), dtype=torch.bool), size)


def draw(queries=64, keys=64, dtype=torch.float32):
    return torch.randn(1, queries, 4, 16, dtype=dtype), *torch.randn(2, 1, keys, 2, 16, dtype=dtype)


@pytest.mark.parametrize("name", ["fa4", "flex", "reference"])
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("dtype", HALF)
def test_different_dtypes_on_lists_are_refused(name, at, dtype):
    tensors = list(draw())
    tensors[at] = tensors[at].to(dtype)
    with pytest.raises(InvalidType, match="attention takes one dtype, cast them first"):
        ops.on_lists(name)(*tensors, causal=True, scale=1.0, blocks=lists())


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_the_reference_is_right_for_different_dtypes(dtypes):
    q, k, v = draw()
    q, k, v = q.to(dtypes[0]), k.to(dtypes[1]), v.to(dtypes[1])
    out, lse = ops.reference(q, k, v, causal=True, scale=0.3)
    true_out, true_lse = ops.reference(q.double(), k.double(), v.double(), causal=True, scale=0.3)
    assert out.dtype == dtypes[0]
    torch.testing.assert_close(out.double(), true_out, atol=1e-2 if dtypes[0] == torch.bfloat16 else 1e-5, rtol=1e-2)
    torch.testing.assert_close(lse.double(), true_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["fa4", "flex"])
def test_gradients_that_an_engine_lacks_are_refused(name):
    q, k, v = draw()
    with pytest.raises(Unsupported, match=f"{name} has no gradient on block lists"):
        ops.on_lists(name)(q, k, v.requires_grad_(), causal=True, scale=1.0, blocks=lists())


def test_the_reference_has_a_gradient_on_lists():
    q, k, v = (x.double().requires_grad_() for x in draw())

    def gradients(out):
        return torch.autograd.grad(out.square().sum(), (q, k, v))

    listed, _ = ops.on_lists("reference")(q, k, v, causal=True, scale=0.3, blocks=lists())
    torch.testing.assert_close(gradients(listed), gradients(ops.sdpa(q, k, v, causal=True, scale=0.3)[0]))


@pytest.mark.parametrize("name", ["fa4", "flex", "reference"])
@pytest.mark.parametrize("shape", [(0, 64), (64, 0), (0, 0)])
def test_no_queries_or_no_keys_on_lists(name, shape):
    out, lse = ops.on_lists(name)(*draw(*shape), causal=False, scale=1.0, blocks=lists(*shape))
    assert out.shape == (1, shape[0], 4, 16) and not out.any()
    assert lse.shape == (1, 4, shape[0]) and bool((lse == -torch.inf).all())


@pytest.mark.parametrize("name", ["sdpa", "reference"])
@pytest.mark.parametrize("gradient", [False, True])
def test_no_queries(name, gradient):
    q, k, v = draw(0, 5)
    out, lse = ops.get(name)(q.requires_grad_(gradient), k, v, causal=True, scale=1.0)
    assert out.shape == q.shape and lse.shape == (1, 4, 0)


# --- gradients never go through a Triton kernel -------------------------------------------------------------------


class OnCuda(torch.Tensor):
    """A tensor of the CPU that says that it lies on a CUDA device."""

    is_cuda = property(lambda self: True)


class Launched(Exception):
    """A Triton kernel would run."""


def launch(*args, **kwargs):
    raise Launched


def shares_of(q, k):
    out = torch.zeros(1, 8, 2, 2)
    block_shares(q, k, torch.zeros(1, 8, 8), torch.full((8,), 8), out, 0, rows=4, per_block=4, scale=1.0)
    return out


@pytest.mark.parametrize(
    ("module", "function"),
    [
        ("merge", lambda q, k: merge([(x, x[..., 0].transpose(1, 2)) for x in (q, k)])[0]),
        ("columns", lambda q, k: columns(q, k, k, torch.ones(1, 8, 1, 8) > 0, size=8, scale=1.0)[0]),
        ("row_lse", lambda q, k: row_lse(q, k, torch.full((8,), 8), scale=1.0)),
        ("block_shares", lambda q, k: shares_of(q, k)),
    ],
)
def test_a_gradient_of_any_input_keeps_to_pytorch(module, function, monkeypatch):
    """A kernel that looked at the first input only would drop the gradients of the others without a word."""
    monkeypatch.setattr("qwen_longctx.ops.triton_runtime.AVAILABLE", True)
    monkeypatch.setattr(devices, "capability", lambda device: (9, 0))
    monkeypatch.setattr(sys.modules[f"qwen_longctx.ops.{module}"], f"{module}_triton", launch)
    q, k = (torch.randn(1, 8, 8, 8).as_subclass(OnCuda) for _ in range(2))
    with pytest.raises(Launched):
        function(q, k)
    k.requires_grad_()
    function(q, k).sum().backward()
    assert k.grad.abs().sum() > 0
    with torch.no_grad(), pytest.raises(Launched):
        function(q, k)


# --- flash-attn-4 is asked for one kernel -------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries", [1, 127, 128, 129, 256, 257, 400])
@pytest.mark.parametrize("past", [0, 128, 383, 384, 1000])
def test_few_queries_take_the_kernel_of_many(causal, queries, past, monkeypatch):
    """Of up to 256 causal queries the package compiles kernels of their own, unless there are few keys as well."""
    keys, asked = queries + past, []

    def flash_attn_func(q, k, v, *, softmax_scale, causal, pack_gqa, block_sparse_tensors, return_lse):
        lists = BlockLists(block_sparse_tensors["full_block_cnt"], block_sparse_tensors["full_block_idx"], 128)
        assert not block_sparse_tensors["mask_block_cnt"].any() and not pack_gqa and return_lse
        asked.append(q.shape[1])
        out, lse = ops.on_lists("reference")(q, k, v, causal=causal, scale=softmax_scale, blocks=lists)
        return out, lse, None

    monkeypatch.setattr(fa4, "_functions", lambda: (flash_attn_func, dict))
    q, k, v = draw(queries, keys)
    mask = torch.rand(1, 4, -(-queries // 128), -(-keys // 128)) < 0.6
    blocks = compact(mask, 128)
    found = fa4.fa4(q, k, v, causal=causal, scale=0.3, blocks=blocks)
    wanted = ops.on_lists("reference")(q, k, v, causal=causal, scale=0.3, blocks=blocks)
    torch.testing.assert_close(found, wanted)
    longer = causal and queries <= 256 and past >= 384
    assert asked == [queries + 256 * longer]


# --- flash-attn-4 warns nobody ------------------------------------------------------------------------------------

FLASH_ATTN = """
import warnings

warnings.warn("imported", UserWarning, stacklevel=1)
warnings.warn("imported by you", FutureWarning, stacklevel=2)
during = lambda: None


def flash_attn_func(q, k, v, **kwargs):
    warnings.warn("called", UserWarning, stacklevel=2)
    with warnings.catch_warnings():  # as its compiler does, so that no filter holds
        warnings.simplefilter("always")
        warnings.warn("Use explicit `struct.scalar.ptr` for pointer instead.", DeprecationWarning, stacklevel=1)
    during()
    return q, q[..., 0].transpose(1, 2), None
"""


@pytest.fixture
def flash_attn(tmp_path, monkeypatch, request):
    """A flash-attn-4 that warns when it is imported and when it is called."""
    package = tmp_path / "flash_attn" / "cute"
    package.mkdir(parents=True)
    (tmp_path / "flash_attn" / "__init__.py").write_text(
        "import warnings\nwarnings.warn('the package', stacklevel=1)\n"
    )
    (package / "__init__.py").write_text(FLASH_ATTN)
    (package / "block_sparsity.py").write_text("BlockSparseTensorsTorch = dict\n")
    monkeypatch.syspath_prepend(tmp_path)
    for function in (fa4._functions, fa4._missing):
        function.cache_clear()
        request.addfinalizer(function.cache_clear)
    yield package
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        del sys.modules[name]


def call_fa4():
    ops.on_lists("fa4")(*draw(), causal=True, scale=1.0, blocks=lists())


def test_flash_attention_4_warns_nobody(flash_attn):
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        hook, filters = warnings.showwarning, list(warnings.filters)
        assert fa4._missing() == ""
        for _ in range(2):
            call_fa4()
        assert [str(warning.message) for warning in shown] == []
        assert warnings.showwarning is hook and warnings.filters == filters
        warnings.warn("of the user", stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["of the user"]


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        (
            "../__init__.py",
            "raise ImportError('undefined symbol: _ZN3c10')",
            "cannot be imported: undefined symbol: _ZN3c10",
        ),
        ("__init__.py", "raise RuntimeError('no driver')", "cannot be imported: no driver"),
        ("__init__.py", "import qwen_no_such_module", "cannot be imported: No module named 'qwen_no_such_module'"),
        ("__init__.py", "", "cannot be imported: cannot import name 'flash_attn_func'"),
        (None, None, "needs the package flash-attn-4"),
    ],
)
def test_a_broken_flash_attention_4_gives_way(file, content, reason, flash_attn, monkeypatch):
    """As FlashAttention-2 built for another PyTorch, which fails when it is looked at."""
    if file:
        (flash_attn / file).write_text(content)
    else:
        (flash_attn / "__init__.py").unlink()
        (flash_attn / "block_sparsity.py").unlink()
        flash_attn.rmdir()
    monkeypatch.setattr(devices, "capability", lambda device: (9, 0))
    kind = CUDA, torch.bfloat16, 128, 128
    assert ops.why_not(*kind)["fa4"].startswith(reason)
    assert ops.list_kernel("auto", *kind) == ("flex" if triton_runtime.AVAILABLE else "reference")


def test_an_error_of_flash_attention_4_leaves_warnings_alone(flash_attn):
    hook = warnings.showwarning
    call_fa4()
    sys.modules["flash_attn.cute"].during = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        call_fa4()
    assert warnings.showwarning is hook


def test_other_threads_warn_while_flash_attention_4_runs(flash_attn):
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        call_fa4()
        inside, done = threading.Event(), threading.Event()
        sys.modules["flash_attn.cute"].during = lambda: (inside.set(), done.wait(30))
        workers = [threading.Thread(target=call_fa4) for _ in range(3)]
        for worker in workers:
            worker.start()
        assert inside.wait(30)
        warnings.warn("of the user", stacklevel=1)
        done.set()
        for worker in workers:
            worker.join(30)
        warnings.warn("afterwards", stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["of the user", "afterwards"]


# --- what importing brings along ----------------------------------------------------------------------------------


def run_alone(script):
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def modules_of(*packages):
    folders = [ROOT / "qwen_longctx" / package for package in packages]
    names = sorted(f"qwen_longctx.{f.name}.{file.stem}" for f in folders for file in f.glob("*.py"))
    return [name.removesuffix(".__init__") for name in names]


@pytest.mark.parametrize("package", ["ops", "geometry"])
def test_importing_imports_no_transformers(package):
    imports = "\n".join(f"import {name}" for name in modules_of(package))
    loaded = set(run_alone(f"import sys\n{imports}\nprint(*sys.modules)").split())
    assert f"qwen_longctx.{package}" in loaded
    rooms = {"transformers", "accelerate", "qwen_longctx.patches", "qwen_longctx.cli", "qwen_longctx.kv.hf_cache"}
    assert loaded & rooms == set()


def test_every_operation_runs_without_triton():
    imports = "\n".join(f"import {name}" for name in modules_of("ops"))
    script = f"""
import sys
sys.modules["triton"] = None  # importing it fails
{imports}
import torch
from qwen_longctx.geometry.positions import Span
from qwen_longctx.geometry.tiles import Tiles
from qwen_longctx.ops.block_shares import joint_shares
from qwen_longctx.ops.columns import columns
from qwen_longctx.ops.compact import compact
from qwen_longctx.ops.device import uses_triton
from qwen_longctx.ops.keep import keep
from qwen_longctx.ops.merge import merge
from qwen_longctx.ops.rotate import rotate
from qwen_longctx.ops.row_lse import row_lse

q, k = torch.randn(1, 64, 4, 16), torch.randn(1, 64, 2, 16)
part = qwen_longctx.ops.sdpa(q, k, k, causal=True, scale=1.0)
merge([part, part]), rotate(q, q[:, :, :1], q[:, :, :1]), row_lse(q, k, torch.full((64,), 64), scale=1.0)
tiles = Tiles.of(Span(0, 64, ()), 32, torch.device("cpu"))
kept = keep(torch.rand(1, 4, 2, 2), tiles, torch.ones(4, 1), by="mass", sink=1, window=1)
assert compact(kept, 32).counts.tolist() == [[[1, 2]] * 4]
columns(q, q.transpose(1, 2), q.transpose(1, 2), torch.ones(1, 4, 2, 64) > 0, size=32, scale=1.0)
joint_shares([(q, k, torch.full((64,), 64))], rows=32, per_block=4, scale=1.0, blocks=16)
class OnCuda(torch.Tensor):
    is_cuda = property(lambda self: True)
print(uses_triton(q.as_subclass(OnCuda)))
"""
    assert run_alone(script).split() == ["False"]
