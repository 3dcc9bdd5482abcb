"""Decoding as a CUDA graph: the forward of a token is captured once, and repeated for the tokens after it.

A decoded token is thousands of small launches, and the host needs longer for them than the device for their work. All
that differs between two tokens lies in a few numbers on the device, which are written anew before each repetition:
the token ids, where the queries look, and where keys and values are put. The host counts along. Whatever else the
captured forward knows (addresses of weights and of the cache, modules, hooks, shapes) is looked at for every token,
and where anything has changed the token runs as if there were no graphs.

A `Decoding` lives on the state of its sequence for the length of a `generate`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from contextlib import suppress
from itertools import chain, repeat
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import nn

from qwen_longctx.attention.choice import blocks_kept
from qwen_longctx.geometry import layout, step
from qwen_longctx.geometry.layout import Layout, RotarySource
from qwen_longctx.geometry.rotary import RotaryTables
from qwen_longctx.geometry.step import Numbers
from qwen_longctx.kv.eight_bit import EightBitStore
from qwen_longctx.kv.hf_cache import LongContextCache, LongContextLayer
from qwen_longctx.kv.sequence import sequence_of
from qwen_longctx.kv.store import Store
from qwen_longctx.ops.choose import MEAN
from qwen_longctx.patches import runs
from qwen_longctx.patches.attention import check_attended
from qwen_longctx.patches.linear import Fp8Linear
from qwen_longctx.patches.method import OLD_NAME, PatchedMethod, slot_of, stock_function
from qwen_longctx.prefill.peak import GRAPH
from qwen_longctx.prefill.run import Run

logger = logging.getLogger(__name__)

FEWEST_TOKENS = 16  # of a generate: for fewer, capturing takes longer than it saves
_DEVICE = "cuda"
_ALIKE = 3  # tokens in a row under equal conditions before one is captured
_HOMES = ("torch.nn.modules.", "transformers.models.qwen2.", "transformers.models.qwen3.", "transformers.activations")
_COPIED = ("position_ids", "cache_position")  # dual chunk attention does not ask for them, the stock forward does
_TAKEN = ("input_ids", "attention_mask", OLD_NAME, "use_cache", *_COPIED)
_STORES = (Store, EightBitStore)
_IDLE = "transformers.utils.output_capturing"  # its hooks do nothing while no outputs of layers are asked for
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@torch.compiler.disable
def outputs(patched: PatchedMethod, model: Any, run: Run, arguments: dict[str, Any]) -> Any:
    """The outputs of the base model for a token of a generate, or None where it has to run without graphs.

    Parameters
    ----------
    patched : PatchedMethod
        Of the forward of the base model.
    model : transformers.PreTrainedModel
        The base model.
    run : Run
    arguments : dict
        Of the forward, by name.
    """
    decoding = sequence_of(run.cache).graphs
    return None if decoding is None else decoding.outputs(patched, model, run, arguments)


class Decoding:
    """What one `generate` has captured; a copy or a pickle of it has captured nothing."""

    def __init__(self) -> None:
        self._watch: _Watch | None = None
        self._conditions: Any = None
        self._alike = 0
        self._token: _Token | None = None
        self._failed = False

    def __deepcopy__(self, memo: Any) -> Decoding:
        return Decoding()

    def __reduce__(self) -> Any:
        return Decoding, ()

    def outputs(self, patched: PatchedMethod, model: Any, run: Run, arguments: dict[str, Any]) -> Any:
        """See `outputs`."""
        if self._failed:
            return None
        conditions = self._now(model, run, arguments)
        if conditions is None or conditions != self._conditions:
            self._conditions, self._alike, self._token = conditions, 0, None
            return None
        self._alike += 1
        if self._token is not None:
            return self._token.repeat(run, arguments)
        if self._alike < _ALIKE or not runs.alone():
            return None
        return self._capture(patched, model, run, arguments)

    def _now(self, model: Any, run: Run, arguments: dict[str, Any]) -> Any:
        """All that a captured forward takes for granted; None where nothing can be captured."""
        if not _plain_call(model, run, arguments):
            return None
        if self._watch is None or self._watch.model is not model or not self._watch.holds():
            self._watch = _Watch(model, run.device)
            self._failed = self._watch.foreign
        if self._failed:
            return None
        rows = len(run.call.rows) if len(set(run.call.rows)) > 1 else 1
        given = tuple(
            (name, arguments[name].shape, arguments[name].dtype)
            for name in ("input_ids", *_COPIED)
            if arguments.get(name) is not None
        )
        kept = _blocks_kept(run)
        if kept is not None:
            for layer in run.cache.layers:
                layer.store.means_room(MEAN)  # those that the host counts, so that the graph adds one at a time
        held = tuple(
            (x.data_ptr(), x.shape, x.stride(), x.dtype) for layer in run.cache.layers for x in layer.store.held()
        )
        return self._watch.state, given, rows, held, kept, _modes(run.device), bool(arguments.get("use_cache"))

    def _capture(self, patched: PatchedMethod, model: Any, run: Run, arguments: dict[str, Any]) -> Any:
        """Run a token in the way that can be captured, then capture it for the next ones."""
        with torch.inference_mode(False):  # else what is written anew could not be written to outside of it
            token = _Token(patched, model, run, arguments)
        result = token.run(run)
        if type(result).__name__ != "BaseModelOutputWithPast":
            self._failed = True
            return result
        try:
            token.capture(run)
        except Exception as error:
            self._failed = True
            logger.warning("decoding goes on without a CUDA graph, which could not be captured: %s", error)
        else:
            self._token = token
        return result


class _Watch:
    """What is looked at for every token to see whether a model is what it was.

    Attributes
    ----------
    state : tuple
    foreign : bool
        It holds something of which nobody knows whether it does the same again when it is repeated.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model = model
        modules = list(model.modules())
        self._kinds = list({type(one) for one in modules})
        self._own = [vars(one) for one in modules]
        self._children = [one._modules for one in modules if one._modules]
        self._tensors = [held for one in modules for held in (one._parameters, one._buffers) if held]
        self._hooks = [getattr(one, name) for one in modules for name in _HOOKS]
        self.foreign = any(map(_foreign, modules)) or not self._all_on(device)
        self.state = () if self.foreign else self._look()

    def holds(self) -> bool:
        """Whether nothing has changed."""
        return self._look() == self.state

    def _all_on(self, device: torch.device) -> bool:
        tensors = (x for held in self._tensors for x in held.values() if x is not None)
        return all(x.device == device and type(x.data) is torch.Tensor for x in tensors)

    def _look(self) -> tuple[Any, ...]:
        # a thousand looks a token, so loops are left to map
        tensors = [x for x in chain.from_iterable(map(dict.values, self._tensors)) if x is not None]
        return (
            list(chain.from_iterable(map(dict.values, self._children))),
            list(map(torch.Tensor.data_ptr, tensors)),
            list(map(attrgetter("dtype"), tensors)),
            list(map(dict.get, self._own, repeat("forward"))),
            [kind.forward for kind in self._kinds],
            list(map(len, self._hooks)),
            self.model.training,
            self.model.config.num_hidden_layers,
        )


def _foreign(module: nn.Module) -> bool:
    """Whether a module is of a kind, or carries something, that is not known to do the same when it is repeated."""
    kind: Any = type(module)
    if kind is not Fp8Linear and not f"{kind.__module__}.".startswith(_HOMES):
        return True
    hooks = chain.from_iterable(getattr(module, name).values() for name in _HOOKS)
    if any(getattr(hook, "__module__", "") != _IDLE for hook in hooks) or hasattr(module, "_hf_hook"):
        return True
    if getattr(module, "_compiled_call_impl", None) is not None:
        return True
    own = vars(module).get(slot_of(module, "forward"))
    runs_as: Any = kind.forward if own is None else own
    return stock_function(runs_as).__module__ not in {base.__module__ for base in kind.__mro__}


def _plain_call(model: Any, run: Run, arguments: dict[str, Any]) -> bool:
    """Whether a call is a token of `generate` and nothing else is asked for."""
    if run.device.type != _DEVICE or model.training or arguments.get("input_ids") is None:
        return False
    asked = {name for name, value in arguments.items() if value is not None and value is not False}
    if not asked <= {*_TAKEN, "return_dict"} or run.weights or run.sparse is not None:
        return False
    if any(getattr(model.config, name, False) for name in ("output_hidden_states", "output_attentions")):
        return False
    if not getattr(model.config, "return_dict", True) or arguments["input_ids"].shape[1] != 1:
        return False
    dtype = model.embed_tokens.weight.dtype
    if torch.is_autocast_enabled(run.device.type) or not _has_room(run, dtype):
        return False
    head_dim = 2 * len(_rotary(model).inv_freq)
    return not layout.why_not(run.settings.kernel, run.device, dtype, head_dim, 1) and not _watched()


def _has_room(run: Run, dtype: torch.dtype) -> bool:
    """Whether the cache takes one more token of every row where it is."""
    if type(run.cache) is not LongContextCache:
        return False
    inference = torch.is_inference_mode_enabled()
    for layer in run.cache.layers:
        store = getattr(layer, "store", None)
        if type(layer) is not LongContextLayer or type(store) not in _STORES or store.buffers is None:
            return False
        keys, (room, held) = store.buffers[0], store.size()
        fits = keys.shape[0] == len(run.call.rows) and room >= run.call.end
        if not fits or (held, keys.device) != (dtype, run.device) or (keys.is_inference() and not inference):
            return False
    return True


def _blocks_kept(run: Run) -> int | None:
    """Blocks of keys that the token attends to in each KV head; None where those are all."""
    share = run.settings.share_decoded(run.call.end)
    return None if share is None else blocks_kept(share, run.call.end)


def _watched() -> bool:
    """Whether operations are watched or changed one by one, or captured by somebody else."""
    everywhere = vars(nn.modules.module)  # torch 2.6 has no function that tells
    if torch._C._len_torch_dispatch_stack() or any(everywhere["_global" + name] for name in _HOOKS):
        return True
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return True
    modes = (torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack()))
    return any(type(one).__name__ != "DeviceContext" for one in modes)


def _modes(device: torch.device) -> tuple[Any, ...]:
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return stream, torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled()


def _rotary(model: Any) -> RotarySource:
    return RotarySource(model.rotary_emb.inv_freq, model.rotary_emb.attention_scaling)


class _Given(NamedTuple):
    """What is written anew for every token, on the device: never in a graph's own memory."""

    arguments: dict[str, torch.Tensor]
    numbers: Numbers
    slot: torch.Tensor


class _Token:
    """The forward of one token, as it is captured.

    It keeps no cache, which keeps it: a cycle would hold the memory of both until Python looks for cycles.
    """

    def __init__(self, patched: PatchedMethod, model: Any, run: Run, arguments: dict[str, Any]) -> None:
        copied = {name: arguments[name].clone() for name in ("input_ids", *_COPIED) if arguments.get(name) is not None}
        numbers = step.numbers(run.call, run.call.cached, run.call.end, run.settings, run.device)
        on_device = Numbers(*(torch.empty_like(x, device=run.device, pin_memory=False) for x in numbers))
        slot = torch.empty(1, dtype=torch.int64, device=run.device)
        self._patched, self._model = patched, model
        self._given = _Given(copied, on_device, slot)
        self._use_cache = bool(arguments.get("use_cache"))
        self._graph: Any = None
        self._hidden: torch.Tensor | None = None
        self._kind: Any = None
        self._refresh(run, arguments)

    def _refresh(self, run: Run, arguments: dict[str, Any]) -> None:
        """Write what is new in this token, in transfers that nobody waits for."""
        call = run.call
        numbers = step.numbers(call, call.cached, call.end, run.settings, run.device)
        for held, new in zip(self._given.numbers, numbers, strict=True):
            held.copy_(new, non_blocking=True)
        self._given.slot.fill_(call.cached)
        for name, held in self._given.arguments.items():
            held.copy_(arguments[name])

    def run(self, run: Run) -> Any:
        """The forward of the token that was last written, without a graph."""
        given, model = self._given, self._model
        dtype = model.embed_tokens.weight.dtype
        with torch.no_grad(), runs.repeated():
            rotary, kernel = _rotary(model), run.settings.kernel
            keys, reach, spots = step.tables(
                given.numbers, len(run.call.rows), run.settings.stride, rotary=rotary, dtype=dtype
            )
            tables = RotaryTables.of_keys(keys, spots, rotary.inv_freq, rotary.attention_scaling)
            how = {"reach": reach, "slot": given.slot, "keep": run.settings.share_decoded(run.call.end)}
            here = Layout((), False, tables, kernel, run.call.end, run.mode, **how)
            blank = torch.empty((0, 0, 0, 0), device=run.device)
            others = {"attention_mask": blank, OLD_NAME: run.cache, "use_cache": self._use_cache}
            result = self._patched.call(model, dual_chunk=here, **given.arguments, **others)
        check_attended(model, here)
        _count(run)
        return result

    def capture(self, run: Run) -> None:
        """Capture the forward of the token that was run last; the cache holds that token afterwards, as before."""
        held: list[Any] = []

        def forward() -> None:
            result = self.run(run)
            held.append((type(result), result.last_hidden_state))

        try:
            self._graph = capture(forward, run.device)
        finally:
            _count(run)
        self._kind, self._hidden = held[-1]

    def repeat(self, run: Run, arguments: dict[str, Any]) -> Any:
        """The outputs of another token."""
        self._refresh(run, arguments)
        self._graph.replay()
        _count(run)
        assert self._hidden is not None
        name = "cache" if "cache" in self._kind.__dataclass_fields__ else OLD_NAME
        # a copy: the next token is written to the same memory
        return self._kind(last_hidden_state=self._hidden.clone(), **{name: run.cache if self._use_cache else None})


def _count(run: Run) -> None:
    """Let every layer hold the token of a call, which is written, and the mean that it may complete."""
    means = _blocks_kept(run) is not None
    for layer in run.cache.layers:
        layer.store.count(run.call.end, means)


def capture(forward: Callable[[], None], device: torch.device) -> Any:
    """Capture what `forward` launches, without waiting for the device; its memory is the graph's own.

    Other threads may go on with CUDA meanwhile.
    """
    graph = torch.cuda.CUDAGraph()
    # the scratch memory of matrix products belongs to a stream: a graph that shared it would write into that of others
    with torch.cuda.device(device):
        if torch.cuda.mem_get_info(device)[0] < GRAPH:  # in mid-capture what a prefill has left cannot be given back
            torch.cuda.empty_cache()
        torch._C._cuda_clearCublasWorkspaces()
        stream, present = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(present)
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                forward()
                graph.capture_end()
            except BaseException:
                _give_up(graph, device)
                raise
            finally:
                torch._C._cuda_clearCublasWorkspaces()
        present.wait_stream(stream)
    return graph


def _give_up(graph: Any, device: torch.device) -> None:
    """Leave a capture that has failed: PyTorch leaves its allocator and its random numbers in it."""
    with suppress(Exception):
        graph.capture_end()
    with suppress(Exception):
        torch._C._cuda_endAllocateToPool(device.index, graph.pool())  # type: ignore[attr-defined]
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        short = torch.cuda.CUDAGraph()
        x = torch.zeros(1, device=device)
        with torch.cuda.stream(torch.cuda.Stream()):
            short.capture_begin(capture_error_mode="thread_local")
            x.add_(1)
            short.capture_end()
