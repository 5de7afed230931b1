import copy
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from lit_scale.factors.blocks import BlockStack, find_blocks
from lit_scale.factors.tokens import TokenSpan, highest, late_span, mark_late, random_scores, release_tokens
from lit_scale.nn import Encoder
from tests.support.data import LENGTH, VOCABULARY
from tests.support.networks import WIDTH, build

pytestmark = [pytest.mark.filterwarnings("ignore")]

B, T, K = 3, 6, 4
KEPT = torch.tensor([[0, 1, 3, 5], [1, 2, 4, 5], [0, 2, 3, 4]])
PADDED = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]]).bool()  # true where there is text
SPAN = [1, 2]  # of four blocks


# ---- choosing


def test_the_highest_scores_are_kept_in_order_of_place() -> None:
    scores = torch.rand(20, 33, generator=torch.Generator().manual_seed(0)).mul(8).round()  # with many equal ones
    for row, found in zip(scores.tolist(), highest(scores, 9).tolist(), strict=True):
        assert found == sorted(sorted(range(33), key=lambda place: (-row[place], place))[:9])


def test_random_choices_are_uniform_and_a_function_of_the_seed() -> None:
    size, length, count, draws = 8, 12, 4, 500
    kept = torch.stack([highest(random_scores(torch.tensor(seed), size, length), count) for seed in range(draws)])
    total = size * draws
    single = Counter(kept.flatten().tolist())
    pairs = Counter(pair for row in kept.flatten(0, 1).tolist() for pair in combinations(row))
    for found, outcomes, share in ((single, 12, 4 / 12), (pairs, 66, 4 * 3 / (12 * 11))):
        assert len(found) == outcomes
        deviations = [(n - total * share) / (total * share * (1 - share)) ** 0.5 for n in found.values()]
        assert max(map(abs, deviations)) < 5  # of one in a million, for draws that are fair
    assert torch.equal(kept[3], highest(random_scores(torch.tensor(3), size, length), count))
    assert not torch.equal(kept[3], kept[4])
    assert not torch.equal(kept[3, 0], kept[3, 1])
    assert torch.equal(random_scores(torch.tensor(3), 5, length), random_scores(torch.tensor(3), 8, length)[:5])
    assert all(len(set(row)) == 4000 for row in random_scores(torch.tensor(2**32 - 1), 2, 4000).tolist())


def combinations(row: list[int]) -> Iterator[tuple[int, int]]:
    return ((a, b) for i, a in enumerate(row) for b in row[i + 1 :])


# ---- a span against blocks that hide the dropped tokens from all others
#
# The reference leaves the sequence whole: each block of the span attends with the dropped positions hidden, and the
# dropped ones get their old values back. So positions, angles and masks are those of the full sequence throughout.


def visible(padding: bool) -> Tensor:
    """Keys that may be attended to inside the span  # (B, 1, 1, T)."""
    kept = torch.zeros(B, T, dtype=torch.bool).scatter(1, KEPT, True)
    return (kept & PADDED if padding else kept)[:, None, None]


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=T,
        pad_token_id=0,
    )
    return LlamaModel(config)


def torch_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, 0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


class Mixer(nn.Module):
    """A plain block that numbers its positions by itself: an embedding of the distance to the mean of what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.place = nn.Embedding(LENGTH, WIDTH)

    def forward(self, x: Tensor, seen: Tensor | None = None, positions: Tensor | None = None) -> tuple[Tensor, None]:
        positions = torch.arange(x.shape[1])[None] if positions is None else positions
        weight = torch.ones(*x.shape[:2], 1) if seen is None else seen[..., None].float()
        mean = (x * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        return x + torch.tanh(self.inner(x + mean)) * self.place(positions), None


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Mixer() for _ in range(4)])

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x, _ = layer(x, seen)
        return x


def lively(network: nn.Module) -> nn.Module:
    """With weights so large that attention tells positions apart; freshly made, it hardly does."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.4)
    return network


def causal(hidden: Tensor) -> Tensor:
    return hidden & torch.ones(T, T, dtype=torch.bool).tril()


# For each network: how to make it, its input, its padding, and a block of it on the whole sequence with hidden keys.
Case = tuple[Callable[[], nn.Module], Callable[[], Any], dict[str, Any], Callable[..., Any]]
IDS = torch.randint(VOCABULARY, (B, T), generator=torch.Generator().manual_seed(1))
STREAM = torch.randn(B, T, WIDTH, generator=torch.Generator().manual_seed(2))
CASES: dict[str, Case] = {
    "timm_vit": (
        lambda: build("timm_vit", dropout=0.0).net,
        lambda: torch.randn(B, 3, 8, 8, generator=torch.Generator().manual_seed(1)),  # 4 patches and the class token
        {},
        lambda block, x, seen, _: block(x, attn_mask=seen[..., :5].expand(-1, 2, 5, -1)),
    ),
    "hf_bert": (
        lambda: build("hf_bert", dropout=0.0).net,
        lambda: IDS,
        {"attention_mask": PADDED.long()},
        lambda block, x, seen, _: block(x, attention_mask=seen.expand(-1, -1, T, -1)),
    ),
    "hf_gpt2": (
        lambda: build("hf_gpt2", dropout=0.0).net,
        lambda: IDS,
        {"attention_mask": PADDED.long()},
        lambda block, x, seen, _: block(x, attention_mask=causal(seen)),
    ),
    "hf_llama": (
        llama,
        lambda: IDS,
        {"attention_mask": PADDED.long()},
        lambda block, x, seen, kwargs: block(
            x, attention_mask=causal(seen), position_embeddings=kwargs["position_embeddings"]
        ),
    ),
    "torch_encoder": (
        torch_encoder,
        lambda: STREAM,
        {"src_key_padding_mask": ~PADDED},
        lambda block, x, seen, _: block(x, src_key_padding_mask=~seen[:, 0, 0]),
    ),
    "plain": (Plain, lambda: STREAM, {"seen": PADDED}, lambda block, x, seen, _: block(x, seen[:, 0, 0])[0]),
    "ours, rotary": (
        lambda: Encoder(4, WIDTH, 2, max_length=T, rotary=True),
        lambda: STREAM,
        {"mask": PADDED[:, None, None]},
        lambda block, x, seen, _: block(x, seen),
    ),
    "ours, causal": (
        lambda: Encoder(4, WIDTH, 2, max_length=T, rotary=True, causal=True),
        lambda: STREAM,
        {},
        lambda block, x, seen, _: block(x, seen),
    ),
    # a head as wide as the sequence is long, and as many samples: only the place in the shape tells them apart
    "ours, equal sizes": (
        lambda: Encoder(4, 2 * T, 2, max_length=T, rotary=True),
        lambda: torch.randn(B, T, 2 * T, generator=torch.Generator().manual_seed(2)),
        {"mask": PADDED[:, None, None].expand(-1, -1, T, -1)},
        lambda block, x, seen, _: block(x, seen),
    ),
}


@contextmanager
def watched(stack: BlockStack, seen: dict[Any, Any]) -> Iterator[None]:
    """Note what enters the span, and what enters the block behind it."""

    def note(place: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen[place] = args[0] if args else next(iter(kwargs.values()))
            seen["kwargs"] = kwargs

        return stack.blocks[place].register_forward_pre_hook(hook, with_kwargs=True)

    handles = [note(place) for place in (SPAN[0], SPAN[-1] + 1)]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_span_computes_what_blocks_do_from_which_the_dropped_tokens_are_hidden(name: str, padded: bool) -> None:
    torch.manual_seed(0)
    make, batch, padding, reference = CASES[name]
    if padded and not padding:
        pytest.skip("takes no padding")
    network = lively(make())
    inputs = batch()
    keywords = padding if padded else {}
    stack = find_blocks(network)
    kept = KEPT if name != "timm_vit" else torch.tensor([[0, 1, 3], [0, 2, 4], [1, 2, 3]])
    span = TokenSpan(stack, SPAN, lambda x: kept)
    seen: dict[Any, Any] = {}
    with watched(stack, seen):
        network(inputs, **keywords)
    span.remove()

    before, after = seen[SPAN[0]], seen[SPAN[-1] + 1]
    length = before.shape[1]
    is_kept = torch.zeros(B, length, dtype=torch.bool).scatter(1, kept, True)
    hidden = (is_kept & PADDED if padded else is_kept)[:, None, None]
    x = before
    for index in SPAN:
        x = torch.where(is_kept[..., None], reference(stack.blocks[index], x, hidden, seen["kwargs"]), x)
    torch.testing.assert_close(after, x, atol=1e-4, rtol=1e-4)
    assert torch.equal(after[~is_kept], before[~is_kept])  # untouched, to the last bit
    assert not torch.equal(after[is_kept], before[is_kept])

    # and the gradients, of what lies below the span too
    weight = torch.randn_like(after)
    parameters = [p for p in network.parameters() if p.requires_grad]
    for one, other in zip(
        torch.autograd.grad(after, parameters, weight, allow_unused=True, retain_graph=True),
        torch.autograd.grad(x, parameters, weight, allow_unused=True),
        strict=True,
    ):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_keeping_every_token_or_choosing_none_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    make, batch, _, _ = CASES[name]
    network = make().eval()
    inputs = batch()
    whole = output(network(inputs))
    for choose in (lambda x: None, lambda x: torch.arange(x.shape[1]).expand(B, -1)):
        span = TokenSpan(find_blocks(network), SPAN, choose)
        torch.testing.assert_close(output(network(inputs)), whole, atol=1e-6, rtol=1e-5)
        span.remove()


def output(found: Any) -> Tensor:
    return found if isinstance(found, Tensor) else found.last_hidden_state


def encoder(**options: Any) -> Any:
    torch.manual_seed(0)
    return lively(Encoder(4, WIDTH, 2, max_length=T, **{"rotary": True, **options}))


def test_kept_tokens_turn_by_their_own_angles() -> None:
    """Without its positions the same span gives other results: the test above would see it."""
    network = encoder()
    block, x = network.blocks[0], STREAM.gather(1, KEPT[..., None].expand(-1, -1, WIDTH))
    assert not torch.allclose(block(x), block(x, None, KEPT), atol=1e-4)
    assert torch.equal(block(x, None, torch.arange(K).expand(B, -1)), block(x))


def test_spans_of_one_block_each_have_choices_of_their_own() -> None:
    network, other = encoder(), encoder()
    stack = find_blocks(network)
    choices = [KEPT, KEPT.flip(0)]
    spans = [TokenSpan(stack, [1], lambda x: choices[0]), TokenSpan(stack, [2], lambda x: choices[1])]
    found = network(STREAM)
    x = other.blocks[0](STREAM)
    for index, kept in zip((1, 2), choices, strict=True):
        mask = torch.zeros(B, T, dtype=torch.bool).scatter(1, kept, True)
        x = torch.where(mask[..., None], other.blocks[index](x, mask[:, None, None]), x)
    torch.testing.assert_close(found, other.norm(other.blocks[3](x)))
    for span in spans:
        span.remove()
    assert torch.equal(network(STREAM), other(STREAM))


# ---- life of a span


def own_forward(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return forward(*args, **kwargs)


def test_nothing_is_left_of_a_span_once_it_is_removed() -> None:
    network = encoder()
    whole, names = network(STREAM), [set(vars(block)) for block in network.blocks]
    mine = network.blocks[2]
    mine.forward = own = lambda *args, **kwargs: type(mine).forward(mine, *args, **kwargs)
    span = TokenSpan(find_blocks(network), SPAN, lambda x: KEPT)
    assert not torch.equal(network(STREAM), whole)
    span.remove()
    assert mine.forward is own
    del mine.forward
    assert [set(vars(block)) for block in network.blocks] == names
    assert torch.equal(network(STREAM), whole)


def test_a_forward_wrapped_by_others_meanwhile_survives_and_lets_all_pass() -> None:
    network = encoder()
    whole, block = network(STREAM), network.blocks[1]
    span = TokenSpan(find_blocks(network), SPAN, lambda x: KEPT)
    inner = block.forward
    block.forward = wrapper = lambda *args, **kwargs: inner(*args, **kwargs)
    span.remove()
    assert block.forward is wrapper
    assert torch.equal(network(STREAM), whole)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
def test_a_network_with_a_span_can_be_copied(copier: Callable[[Any], Any]) -> None:
    network = encoder()
    TokenSpan(find_blocks(network), SPAN, fixed_choice)
    found = network(STREAM)  # a span in flight holds tensors of a graph
    other = copier(network)
    assert torch.equal(other(STREAM), found)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert torch.equal(other(STREAM), found), "the copy runs its own blocks"
    release_tokens(find_blocks(other))
    assert not torch.equal(other(STREAM), found)


def fixed_choice(x: Tensor) -> Tensor:
    return KEPT


def test_blocks_may_be_recomputed_in_the_backward_pass() -> None:
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        network = build("hf_gpt2", dropout=0.0).net
        TokenSpan(find_blocks(network), SPAN, fixed_choice)
        if recompute:
            network.gradient_checkpointing_enable({"use_reentrant": False})
        network.train()
        output(network(IDS)).square().mean().backward()
        gradients.append([p.grad for p in network.parameters()])
    assert all(map(torch.equal, *gradients))


class Choice:
    """Positions from a seed, as a compiled network meets them."""

    def __init__(self) -> None:
        self.seed, self.count = torch.tensor(0), K

    def __call__(self, x: Tensor) -> Tensor:
        return highest(random_scores(self.seed, x.shape[0], x.shape[1]), self.count)


@pytest.mark.parametrize(
    ("what", "graphs"),
    [
        ("network", [1, 2]),
        # outside of the span, its first and its last block, each with and without a gradient of its input; from the
        # second number of tokens on torch compiles for any number
        pytest.param("blocks", [4, 6, 6], marks=pytest.mark.slow),
        pytest.param("blocks, before the span", [3, 5, 5], marks=pytest.mark.slow),
    ],
)
def test_a_compiled_network_recompiles_at_most_once_for_each_number_of_kept_tokens(
    what: str, graphs: list[int]
) -> None:
    found, compiles = {}, []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        network = encoder()
        if compiled and what == "blocks, before the span":
            for block in network.blocks:
                block.compile(backend="eager", fullgraph=True)
        choice = Choice()
        TokenSpan(find_blocks(network), SPAN, choice)
        if compiled and what == "network":
            network = torch.compile(network, backend="eager", fullgraph=True)
        if compiled and what == "blocks":
            for block in network.blocks:
                block.compile(backend="eager", fullgraph=True)
        for count in (2, 3, 4)[: len(graphs)]:
            choice.count = count
            for seed in range(3):
                choice.seed = torch.tensor(seed)
                network(STREAM).square().sum().backward()
            compiles.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        found[compiled] = [p.grad for p in network.parameters()]
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other)
    eager, compiled_ones = compiles[: len(graphs)], compiles[len(graphs) :]
    assert eager == [0] * len(graphs)
    assert all(0 < made <= most for made, most in zip(compiled_ones, graphs, strict=True)), compiles


# ---- bad input


def test_what_is_not_a_sequence_is_refused() -> None:
    network = build("plain_torch", dropout=0.0).net  # blocks on (B, C)
    TokenSpan(find_blocks(network), SPAN, fixed_choice)
    with pytest.raises(ValueError, match=r"from \(batch, tokens, channels\), but the blocks get \(3, 16\)"):
        network(torch.randn(3, 3, 8, 8))


def test_time_before_batch_is_refused() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, WIDTH)
    with pytest.raises(ValueError, match="build them with batch_first=True"):
        TokenSpan(find_blocks(nn.TransformerEncoder(layer, 4)), SPAN, fixed_choice)


def test_a_mask_for_all_samples_of_queries_and_keys_is_refused_with_what_would_work() -> None:
    network = torch_encoder()
    TokenSpan(find_blocks(network), SPAN, fixed_choice)
    with pytest.raises(ValueError, match=r"a tensor \(6, 6\).*masks of queries and keys as \(B or 1, 1, T, T\)"):
        network(STREAM, mask=torch.zeros(T, T).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf))


@pytest.mark.parametrize("indices", [[], [-1], [3, 4]])
def test_a_span_that_the_network_does_not_have_is_refused(indices: list[int]) -> None:
    with pytest.raises(ValueError, match="does not fit into 'blocks', which has 4"):
        TokenSpan(find_blocks(encoder()), indices, fixed_choice)


# ---- masks that join late


@pytest.mark.parametrize("name", ["bert", "timm_vit", "hf_bert", "torch_encoder"])
def test_weights_of_late_masks_are_refused_by_a_network_that_does_not_know(name: str) -> None:
    module = build(name)
    plain = list(module.state_dict())
    stack = find_blocks(module)
    mark_late(stack, (0, 3))
    weights = module.state_dict()
    assert len(weights) == len(plain) + 1
    with pytest.raises(RuntimeError, match="masks join late: evaluate with the technique"):
        build(name).load_state_dict(weights)

    other = build(name, seed=1)
    mark_late(find_blocks(other), (0, 3))
    other.load_state_dict(weights)
    assert all(torch.equal(one, two) for one, two in zip(other.parameters(), module.parameters(), strict=True))
    third = build(name)
    mark_late(find_blocks(third), (0, 2))
    with pytest.raises(RuntimeError, match=r"masks pass blocks \(0, 3\) of .* by, but here they pass \(0, 2\)"):
        third.load_state_dict(weights)

    average = copy.deepcopy(module)
    assert list(average.state_dict()) == list(weights)
    release_tokens(stack)
    assert list(module.state_dict()) == plain
    assert late_span(stack) is None
    assert list(average.state_dict()) == list(weights), "the copy has a mark of its own"
    average.load_state_dict(weights)
