"""Loss and gradients of a model in training, against stock transformers on every document by itself, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from helpers import tiny_model
from qwen_longctx.errors import InvalidValue, Unsupported
from qwen_longctx.training.attention import KERNELS, Documents, Kernel, attend, choose
from qwen_longctx.training.losses import linear_cross_entropy, token_losses
from qwen_longctx.training.model import Trained, Work, check_model, trainable_layers
from qwen_longctx.training.offload import Offload
from qwen_longctx.training.packing import IGNORED, Document, Packed, pack

ON_CPU = [name for name in KERNELS if name in ("cpu", "reference")]
CPU = torch.device("cpu")


def documents(lengths: list[int], answers_only: bool = False) -> list[Document]:
    """Random ones; with `answers_only` the loss counts for some tokens only."""
    source = np.random.default_rng(lengths)
    return [
        Document(source.integers(1, 97, n), source.random(n) < 0.5 if answers_only else np.ones(n, dtype=bool))
        for n in lengths
    ]


def gradients(model: torch.nn.Module, losses: list[torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    """Sum of the losses, and the gradients of it."""
    model.zero_grad()
    for loss in losses:
        loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return sum(float(loss.detach()) for loss in losses), found


def by_ours(model: torch.nn.Module, work: Work, packed: list[Packed]) -> tuple[float, dict[str, torch.Tensor]]:
    with trainable_layers(model):
        trained = Trained(model, work)
        return gradients(model, [trained(one) for one in packed])


def by_stock(model: torch.nn.Module, packed: list[Packed]) -> tuple[float, dict[str, torch.Tensor]]:
    return gradients(
        model,
        [
            functional.cross_entropy(model(one.ids[None]).logits[0], one.labels, ignore_index=IGNORED, reduction="sum")
            for one in packed
        ],
    )


def assert_same(found, wanted, most=1e-12):
    assert abs(found[0] - wanted[0]) <= most * abs(wanted[0])
    assert found[1].keys() == wanted[1].keys()
    for name, true in wanted[1].items():
        assert (found[1][name] - true).abs().max() <= most * true.abs().max(), name


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("kernel", ON_CPU)
@pytest.mark.parametrize("answers_only", [False, True])
def test_a_packed_sequence_is_its_documents(family, kernel, answers_only):
    """Nothing leaks between documents, neither by attention nor by positions or labels; padding counts for nothing."""
    model = tiny_model(family, dtype=torch.float64).train()
    parts = documents([30, 1, 45, 2, 20], answers_only)
    together = pack(parts, 110, 0)
    apart = [pack([one], len(one.ids), 0) for one in parts]
    wanted = by_stock(model, [one for one in apart if (one.labels != IGNORED).any()])
    for work in (Work(KERNELS[kernel], slice_tokens=7), Work(KERNELS[kernel], recompute=False)):
        assert_same(by_ours(model, work, [together]), wanted)
        assert_same(by_ours(model, work, apart), wanted)


def test_a_document_does_not_see_another():
    """Other tokens in one document change no loss in the next; a leak of one token would."""
    model = tiny_model(dtype=torch.float64)
    first, second = documents([40, 30])
    other = documents([41, 30])[0]
    losses = []
    for before in (first, Document(other.ids[:40], other.counts[:40])):
        with trainable_layers(model):
            losses.append(Trained(model, Work(KERNELS["cpu"]))(pack([before, second], 70, 0), each=True))
    assert torch.equal(losses[0][40:], losses[1][40:])
    assert not torch.equal(losses[0][:40], losses[1][:40])


@pytest.mark.parametrize("tied", [False, True])
def test_losses_and_rows_add_up(tied):
    """The sum of the losses of tokens is the loss; layers are the model's own again after the block."""
    model = tiny_model(dtype=torch.float64, tie_word_embeddings=tied).train()
    packed = pack(documents([30, 20]), 50, 0)
    wanted = by_stock(model, [pack([one], len(one.ids), 0) for one in documents([30, 20])])
    with trainable_layers(model):
        trained = Trained(model, Work(KERNELS["cpu"]))
        each = trained(packed, each=True)
        assert not each.requires_grad and float(each.sum()) == pytest.approx(wanted[0], rel=1e-12)
    assert "forward" not in vars(model.model.layers[0])
    assert_same(by_ours(model, Work(KERNELS["cpu"]), [packed]), wanted)


def test_parameters_behind_frozen_ones_learn():
    """Only the first layer's MLP learns: what comes before it asks for no gradient."""
    model = tiny_model(dtype=torch.float64).train().requires_grad_(False)
    model.model.layers[0].mlp.requires_grad_(True)
    packed = pack(documents([40]), 40, 0)
    wanted = by_stock(model, [packed])
    assert wanted[1]
    assert_same(by_ours(model, Work(KERNELS["cpu"], slice_tokens=16), [packed]), wanted)


# --- offload ------------------------------------------------------------------------------------------------------


def test_offload_changes_no_bit(monkeypatch):
    """Everything that waits on the host comes back as it was, in whatever order it is asked for."""
    from qwen_longctx.training import model as of_model

    used: list[Offload] = []

    def small(device: torch.device) -> Offload:
        used.append(Offload(device, least=1))
        return used[-1]

    monkeypatch.setattr(of_model, "Offload", small)
    model = tiny_model(dtype=torch.float32, num_hidden_layers=5).train()
    packed = pack(documents([50, 30]), 80, 0)
    plain = by_ours(model, Work(KERNELS["cpu"], slice_tokens=32), [packed])
    assert not used
    offloaded = by_ours(model, Work(KERNELS["cpu"], slice_tokens=32, offload=True), [packed])
    assert used and plain[0] == offloaded[0]
    assert all(torch.equal(plain[1][name], offloaded[1][name]) for name in plain[1])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=14), st.randoms())
def test_offload_gives_back_what_it_took(sizes, source):
    offload = Offload(CPU, least=8)
    tensors = [torch.randn(size) for size in sizes]
    handles = [offload.keep(x) for x in tensors]
    assert all(isinstance(handle, torch.Tensor) == (x.nbytes < 8) for handle, x in zip(handles, tensors, strict=True))
    order = list(range(len(sizes)))[::-1]
    if source.random() < 0.5:
        source.shuffle(order)
    for number in order:
        assert torch.equal(offload.bring(handles[number]), tensors[number])
    assert all(torch.equal(offload.bring(handle), x) for handle, x in zip(handles, tensors, strict=True))


# --- cross-entropy ------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(2, 40), st.integers(1, 40), st.integers(0, 1 << 20))
def test_chunked_cross_entropy(tokens, width, words, chunk, seed):
    torch.manual_seed(seed)
    hidden = torch.randn(tokens, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(words, width, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, words, (tokens,)).masked_fill(torch.rand(tokens) < 0.3, IGNORED)
    wanted = functional.cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORED, reduction="sum")
    true = torch.autograd.grad(2.5 * wanted, (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, labels, chunk)
    found = torch.autograd.grad(2.5 * loss, (hidden, weight))
    torch.testing.assert_close(loss, wanted)
    for mine, exact in zip(found, true, strict=True):
        torch.testing.assert_close(mine, exact)
    torch.testing.assert_close(token_losses(hidden, weight, labels, chunk).sum(), wanted)


@pytest.mark.parametrize("learns", ["hidden", "weight"])
def test_chunked_cross_entropy_where_one_side_is_frozen(learns):
    sides = {"hidden": torch.randn(9, 4), "weight": torch.randn(11, 4)}
    labels = torch.randint(0, 11, (9,))
    sides[learns].requires_grad_()
    (wanted,) = torch.autograd.grad(
        functional.cross_entropy(sides["hidden"] @ sides["weight"].T, labels, reduction="sum"), sides[learns]
    )
    (found,) = torch.autograd.grad(linear_cross_entropy(*sides.values(), labels, chunk=4), sides[learns])
    torch.testing.assert_close(found, wanted)


def test_chunked_cross_entropy_in_half_precision():
    """Twice the error of plain PyTorch in the same dtype."""
    hidden, weight, labels = torch.randn(300, 64), torch.randn(500, 64), torch.randint(0, 500, (300,))
    exact, plain, ours = [], [], []
    for found, dtype in ((exact, torch.float64), (plain, torch.bfloat16), (ours, torch.bfloat16)):
        sides = [x.bfloat16().to(dtype).requires_grad_() for x in (hidden, weight)]
        if found is ours:
            loss = linear_cross_entropy(*sides, labels, chunk=64)
        else:
            logits = (sides[0] @ sides[1].T).to(torch.promote_types(dtype, torch.float32))
            loss = functional.cross_entropy(logits, labels, reduction="sum")
        found += [loss.detach().double(), *(g.double() for g in torch.autograd.grad(loss, sides))]
    for true, rough, mine in zip(exact, plain, ours, strict=True):
        assert (mine - true).norm() <= 2 * (rough - true).norm() + 2**-8 * true.norm()


# --- the choice of a kernel ---------------------------------------------------------------------------------------


def test_kernels_that_do_not_run_here_say_why():
    choice = choose("auto", CPU, torch.float32, 4, 2, 8, 100)
    assert choice.kernel.name == "cpu"
    if not torch.cuda.is_available():
        assert set(choice.found) == {"fa4", "cudnn", "flash", "efficient"} and all(choice.found.values())
    with pytest.raises(InvalidValue, match="kernel 'cudnn' cannot be taken: it runs on CUDA devices"):
        choose("cudnn", CPU, torch.bfloat16, 4, 2, 64, 100)
    with pytest.raises(InvalidValue, match="kernel must be auto or one of fa4, .*, got 'fast'"):
        choose("fast", CPU, torch.float32, 4, 2, 8, 100)


@pytest.mark.parametrize("fault", ["leaks", "scales", "raises", None])
def test_kernels_that_compute_something_else_are_not_taken(monkeypatch, fault):
    """One that lets documents see each other, one whose gradients are off by a tenth, one that fails."""
    true = KERNELS["cpu"]

    def forward(q, k, v, documents, scale):
        if fault == "raises":
            raise RuntimeError("no such instruction")
        if fault == "leaks":
            documents = Documents(documents.starts[[0, -1]])
        return true.forward(q, k, v, documents, scale)

    def backward(*arguments):
        return tuple(x * (1.1 if fault == "scales" else 1) for x in true.backward(*arguments))

    monkeypatch.setitem(KERNELS, "efficient", Kernel("efficient", forward, backward, lambda *_: ""))
    if fault is None:
        assert choose("efficient", CPU, torch.bfloat16, 4, 2, 8, 100).kernel.name == "efficient"
        return
    said = "no such instruction" if fault == "raises" else "computes something else"
    with pytest.raises(InvalidValue, match=said):
        choose("efficient", CPU, torch.bfloat16, 4, 2, 8, 100)
    assert choose("auto", CPU, torch.bfloat16, 4, 2, 8, 100).kernel.name == "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ON_CPU)
def test_attention_in_working_precision(dtype, kernel):
    """Twice the error of a plain softmax in the same dtype, of the result and of all gradients."""
    lengths, heads, kv_heads, dim = [17, 1, 40], 4, 2, 8
    at = Documents(torch.tensor([0, *lengths]).cumsum(0).int())
    drawn = [torch.randn(58, n, dim, dtype=torch.float64) for n in (heads, kv_heads, kv_heads, heads)]
    drawn = [x.to(dtype).double() for x in drawn]

    def plain(q, k, v):
        outs = []
        for part in at.slices:
            one = [x[part].repeat_interleave(heads // x.shape[1], 1).transpose(0, 1) for x in (q, k, v)]
            logits = one[0] @ one[1].transpose(1, 2) * dim**-0.5
            hidden = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
            outs.append((logits.masked_fill(hidden, -torch.inf).softmax(-1) @ one[2]).transpose(0, 1))
        return torch.cat(outs)

    def found(function, kind):
        q, k, v = (x.to(kind).requires_grad_() for x in drawn[:3])
        out = function(q, k, v)
        return [out.detach().double(), *(g.double() for g in torch.autograd.grad(out, (q, k, v), drawn[3].to(kind)))]

    exact, rough = found(plain, torch.float64), found(plain, dtype)
    ours = found(lambda q, k, v: attend(q, k, v, at, KERNELS[kernel], dim**-0.5), dtype)
    steps = (64 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps
    for true, beside, mine in zip(exact, rough, ours, strict=True):
        assert (mine - true).abs().max() <= 2 * (beside - true).abs().max() + steps * true.abs().max().clamp(min=1)


@pytest.mark.gpu
def test_kernels_of_this_card_are_right_and_the_fastest_is_taken():
    choice = choose("auto", torch.device("cuda"), torch.bfloat16, 14, 2, 64, 16384)
    assert all(not isinstance(value, str) or "computes something else" not in value for value in choice.found.values())
    timed = {name: value for name, value in choice.found.items() if not isinstance(value, str)}
    assert timed and choice.kernel.name == min(timed, key=timed.__getitem__)


@pytest.mark.gpu
def test_offload_changes_no_bit_on_a_card():
    model = tiny_model(dtype=torch.bfloat16, hidden_size=512, head_dim=64, num_hidden_layers=6).cuda().train()
    packed = pack(documents([3000, 1000]), 4000, 0)
    kernel = KERNELS["flash"]
    work = Work(kernel, slice_tokens=512)
    with trainable_layers(model), torch.no_grad():
        plain = Trained(model, work)(packed, each=True)
    losses = [by_ours(model, Work(kernel, 512, offload=on), [packed]) for on in (False, True)]
    assert losses[0][0] == losses[1][0] and float(plain.sum()) == pytest.approx(losses[0][0], rel=1e-3)
    for name, true in losses[0][1].items():
        assert (losses[1][1][name] - true).norm() <= 2**-6 * true.norm(), name  # sums of atomics differ


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_type": "llama"}, "type 'llama' cannot be trained here: name one of qwen2, qwen3"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 cannot be trained here"),
        ({"rope": "yarn"}, r"stretches its positions \(rope_type 'yarn'\)"),
    ],
)
def test_models_that_cannot_be_trained(changed, said):
    config = tiny_model().config
    if "rope" in changed:
        config.rope_scaling = config.rope_parameters = {"rope_type": changed["rope"], "rope_theta": 1e4, "factor": 2.0}
    elif "model_type" in changed:
        config = type("Config", (), {**vars(config), **changed})()
    else:
        config.update(changed)
    with pytest.raises(Unsupported, match=said):
        check_model(config)
