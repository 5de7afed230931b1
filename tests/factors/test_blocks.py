import copy
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

from lit_scale.factors.blocks import BlockList, BlockStack, find_blocks
from tests.support.data import CLASSES, LENGTH, VOCABULARY
from tests.support.equality import assert_same
from tests.support.networks import DEPTH, FOREIGN, WIDTH, build

pytestmark = [pytest.mark.filterwarnings("ignore")]


def eva(depth: int) -> nn.Module:
    from timm.models.eva import Eva

    return Eva(img_size=8, patch_size=4, embed_dim=WIDTH, depth=depth, num_heads=2, num_classes=CLASSES)


def llama(depth: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=depth,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        pad_token_id=0,
    )
    return LlamaModel(config)


NETWORKS: dict[str, tuple[Callable[[int], nn.Module], str]] = {
    "timm_vit": (lambda depth: build("timm_vit", depth=depth, dropout=0.0).net, "blocks"),
    "timm_eva": (eva, "blocks"),
    "hf_bert": (lambda depth: build("hf_bert", depth=depth).net, "encoder.layer"),
    "hf_gpt2": (lambda depth: build("hf_gpt2", depth=depth).net, "h"),
    "hf_llama": (llama, "layers"),
    "torch_encoder": (lambda depth: build("torch_encoder", depth=depth).net, "1.layers"),
    "plain_torch": (lambda depth: build("plain_torch", depth=depth).net, "layers"),
    "ours": (lambda depth: build("bert", depth=depth), "encoder.blocks"),
}


def made(name: str, depth: int = DEPTH) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name][0](depth)


def run(name: str, network: nn.Module) -> Tensor:
    """The output for a fixed batch, with fixed dropout."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 8, 8, generator=generator)
    ids = torch.randint(VOCABULARY, (2, LENGTH), generator=generator)
    torch.manual_seed(2)
    found = network(images if name in {"timm_vit", "timm_eva", "plain_torch"} else ids)
    return found if isinstance(found, Tensor) else found.last_hidden_state


def truncated(name: str, network: nn.Module, active: tuple[int, ...]) -> nn.Module:
    """A network that was built with so many blocks, and has the weights of the active ones."""
    path, weights = NETWORKS[name][1], dict(network.named_parameters()) | dict(network.named_buffers())
    small = made(name, len(active))
    with torch.no_grad():
        for key, tensor in [*small.named_parameters(), *small.named_buffers()]:
            source = key
            for place, index in enumerate(active):
                if key.startswith(f"{path}.{place}."):
                    source = f"{path}.{index}.{key[len(f'{path}.{place}.') :]}"
            tensor.copy_(weights[source])
    return small


# ---- a gated network is the truncated one


@pytest.mark.parametrize("active", [(0, 1), (1, 3), (2,)], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_gated_network_computes_what_a_truncated_one_does(name: str, active: tuple[int, ...]) -> None:
    network = made(name)
    everything = run(name, network)
    names = [key for key, _ in network.named_parameters()]
    stack = find_blocks(network)
    assert stack.path == NETWORKS[name][1]
    assert torch.equal(run(name, network), everything)
    stack.activate(active)
    small = truncated(name, network, active)
    for mode in (True, False):
        one, other = run(name, network.train(mode)), run(name, small.train(mode))
        assert torch.equal(one, other)
        assert not torch.equal(one, everything)
        if mode:
            one.square().mean().backward()
            other.square().mean().backward()
    assert [key for key, _ in network.named_parameters()] == names
    expected = [p.grad for p in small.parameters()]
    found = [p.grad for p in network.parameters() if not any(p is q for q in hidden_parameters(stack))]
    assert_same(found, expected)
    assert all(p.grad is None for p in hidden_parameters(stack))
    stack.activate(range(DEPTH))
    network.train()
    assert torch.equal(run(name, network), everything)


def hidden_parameters(stack: BlockStack) -> list[nn.Parameter]:
    return [p for i, block in enumerate(stack.blocks) if i not in stack.active for p in block.parameters()]


def test_the_first_block_of_a_t5_is_another_and_still_starts_the_stack() -> None:
    deep, shallow = t5(4).encoder, t5(2).encoder  # only the first block has the weights of relative positions
    stack = find_blocks(deep)
    pairs = stack.copy(0, 2)
    assert len(pairs) == len(list(stack.blocks[2].parameters())) == len(list(stack.blocks[0].parameters())) - 1
    assert all(torch.equal(a, b) for a, b in pairs)
    stack.activate([0, 2])
    weights = deep.state_dict()
    shallow.load_state_dict({key: weights[key.replace("block.1.", "block.2.")] for key in shallow.state_dict()})
    ids = torch.arange(LENGTH)[None]
    one, other = (network.eval()(ids).last_hidden_state for network in (deep, shallow))
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_is_left_of_the_gate_once_all_blocks_run(name: str) -> None:
    network = made(name)
    kind, keys = type(network.get_submodule(NETWORKS[name][1])), list(network.state_dict())
    stack = find_blocks(network)
    assert list(network.state_dict()) == keys
    stack.activate([0])
    stack.release()
    container: Any = stack.container
    assert len(container) == 1  # a network is not deepened by the way
    stack.activate(range(DEPTH))
    stack.release()
    assert type(stack.container) is kind
    assert list(network.state_dict()) == keys
    assert name == "ours" or "_active" not in vars(stack.container)


def test_a_gated_list_shows_its_active_blocks_however_it_is_read() -> None:
    network = made("plain_torch")
    stack = find_blocks(network)
    blocks = stack.blocks
    stack.activate([3, 1])
    shown: Any = network.layers
    assert list(shown) == [blocks[1], blocks[3]]
    assert list(shown.children()) == [blocks[1], blocks[3]]
    assert (shown[0], shown[-1], len(shown)) == (blocks[1], blocks[3], 2)
    assert list(shown[:1]) == [blocks[1]]
    assert isinstance(shown[1:], nn.ModuleList)
    assert blocks[1] in shown
    assert blocks[0] not in shown
    assert repr(stack) == "BlockStack(layers: 2 of 4 _Layer active)"
    replacement = copy.deepcopy(blocks[0])
    shown[1] = replacement
    assert stack.blocks == [*blocks[:3], replacement]
    with pytest.raises(IndexError):
        shown[2]


def test_a_slice_of_a_gated_sequential_can_be_called() -> None:
    network = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4)))
    stack = find_blocks(nn.ModuleDict({"body": network}))
    stack.activate([0, 3])
    x = torch.randn(2, 4)
    assert torch.equal(network[1:](x), stack.blocks[3](x))


def test_what_is_done_to_a_whole_network_reaches_its_hidden_blocks() -> None:
    network = made("timm_vit")
    stack = find_blocks(network)
    stack.activate([0])
    network.eval()
    network.double()
    visited: list[nn.Module] = []
    network.apply(visited.append)
    network.requires_grad_(False)
    for block in stack.blocks:
        assert not block.training
        assert block in visited
        assert all(p.dtype == torch.float64 and not p.requires_grad for p in block.parameters())


def test_gradient_checkpointing_runs_the_active_blocks_only() -> None:
    network = made("timm_vit")
    find_blocks(network).activate([0, 2])
    expected = run("timm_vit", network)
    checkpointed: Any = network
    checkpointed.set_grad_checkpointing(True)
    assert torch.equal(run("timm_vit", network), expected)
    body = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4)))
    find_blocks(nn.ModuleDict({"body": body})).activate([1, 2])
    x = torch.randn(2, 4, requires_grad=True)
    assert torch.equal(checkpoint_sequential(body, 2, x, use_reentrant=False), body(x))


@pytest.mark.parametrize("indices", [[], [4], [-1], [0, 7]])
def test_blocks_that_do_not_exist_cannot_be_activated(indices: list[int]) -> None:
    with pytest.raises(ValueError, match="cannot activate blocks .* of 'layers', which has 4"):
        find_blocks(made("plain_torch")).activate(indices)


# ---- copies and files


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["timm_vit", "torch_encoder", "ours"])
def test_a_gated_network_can_be_copied(name: str, copier: Callable[[Any], Any]) -> None:
    network = made(name)
    stack = find_blocks(network)
    stack.activate([0, 2])
    twin = copier(network)
    assert torch.equal(run(name, twin), run(name, network))
    stack.activate([0])
    assert find_blocks(twin).active == (0, 2)


class MyList(BlockList):
    pass


def test_a_subclass_of_ours_stays_what_it_is() -> None:
    blocks = MyList(nn.Sequential(nn.Linear(2, 2)) for _ in range(3))
    BlockStack("", blocks).activate([0])
    twin = pickle.loads(pickle.dumps(blocks))
    assert type(twin) is type(blocks) is MyList
    assert len(twin) == 1


def test_our_list_grows_like_any_list_while_all_of_it_runs() -> None:
    blocks = BlockList()
    for _ in range(3):
        blocks.append(nn.Linear(2, 2))
    blocks.extend([nn.Linear(2, 2)])
    blocks += [nn.Linear(2, 2)]
    assert len(blocks) == 5
    assert list(blocks._modules) == list("01234")
    BlockStack("", blocks).activate([0, 1])
    with pytest.raises(RuntimeError, match="activate all of them before adding more"):
        blocks.append(nn.Linear(2, 2))
    assert len(blocks._modules) == 5


def stored(network: nn.Module) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_of_a_partly_active_network_says_so(name: str) -> None:
    network = made(name)
    find_blocks(network).activate([0, 2])
    state, expected = stored(network), run(name, network.eval())
    torch.manual_seed(9)
    other = NETWORKS[name][0](DEPTH).eval()
    if name != "ours":
        with pytest.raises(RuntimeError, match="active blocks: resume with the technique that chose them"):
            other.load_state_dict(state)
        find_blocks(other)
    other.load_state_dict(state)  # ours restores by this alone
    assert torch.equal(run(name, other), expected)
    whole = made(name).eval()
    other.load_state_dict(stored(whole))
    assert torch.equal(run(name, other), run(name, whole))


def test_a_key_with_another_wording_is_still_read() -> None:
    network = made("ours")
    find_blocks(network).activate([0, 2])
    state = {
        re.sub("active blocks.*", "active blocks: older advice", key): v for key, v in network.state_dict().items()
    }
    other = made("ours")
    other.load_state_dict(state)
    assert find_blocks(other).active == (0, 2)


def test_loading_other_parts_leaves_the_active_blocks_alone() -> None:
    network = made("plain_torch")
    stack = find_blocks(network)
    stack.activate([0, 1])
    network.load_state_dict({"head.bias": torch.zeros(CLASSES)}, strict=False)
    assert stack.active == (0, 1)


@pytest.mark.parametrize("strict", [True, False])
def test_active_blocks_that_the_network_does_not_have_are_refused(strict: bool) -> None:
    network = made("plain_torch")
    find_blocks(network).activate([0, 3])
    shallow = made("plain_torch", 2)
    stack = find_blocks(shallow)
    with pytest.raises(RuntimeError, match=r"active blocks \[0, 3\] of 'layers', which has only 2"):
        shallow.load_state_dict(network.state_dict(), strict=strict)
    assert stack.active == (0, 1)


def test_copying_a_block_takes_parameters_and_buffers_and_names_the_pairs() -> None:
    network = made("plain_torch")
    stack = find_blocks(network)
    network.train()
    stack.activate([0])
    run("plain_torch", network)
    pairs = stack.copy(0, 2)
    one, other = stack.blocks[0], stack.blocks[2]
    assert [id(a) for a, _ in pairs] == [id(p) for p in one.parameters()]
    assert [id(b) for _, b in pairs] == [id(p) for p in other.parameters()]
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
    assert other.calls == 1
    shared = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.Tanh())] * 2)
    assert BlockStack("", shared).copy(0, 1) == []  # nothing to move where blocks are one and the same


# ---- finding


class Holder(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def layers(*widths: int) -> nn.ModuleList:
    return nn.ModuleList([nn.Sequential(nn.Linear(4, width), nn.Linear(width, 4)) for width in widths])


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.experts = layers(8, 8, 8)


def t5(depth: int = 2) -> Any:
    from transformers import T5Config, T5Model

    config = T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=depth, num_heads=2)
    return T5Model(config)


def swin() -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(img_size=32, patch_size=4, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4)


def cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))


@pytest.mark.parametrize(
    ("make", "candidates"),
    [
        (t5, ["'encoder.block' (2 x T5Block)", "'decoder.block' (2 x T5Block)"]),
        (swin, ["'layers.0.blocks' (2 x SwinTransformerBlock)", "'layers.1.blocks' (2 x SwinTransformerBlock)"]),
        (lambda: Holder(a=layers(5, 5), b=layers(8, 8, 8)), ["'a' (2 x Sequential)", "'b' (3 x Sequential)"]),
    ],
    ids=["T5", "Swin", "two lists"],
)
def test_several_lists_of_blocks_are_named_in_the_error(make: Callable[[], nn.Module], candidates: list[str]) -> None:
    network = make()
    with pytest.raises(ValueError, match="found several lists of blocks.*choose one with blocks='...'") as error:
        find_blocks(network)
    for candidate in candidates:
        assert candidate in str(error.value)
    path = candidates[0].split("'")[1]
    stack = find_blocks(network, path)
    assert stack.path == path
    with pytest.raises(ValueError, match="blocks='nowhere': .* has no such part; candidates: ") as error:
        find_blocks(network, "nowhere")
    assert candidates[1] in str(error.value)
    with pytest.raises(ValueError, match=f"blocks='{path}.0' is a .*, not a ModuleList or Sequential"):
        find_blocks(network, f"{path}.0")


@pytest.mark.parametrize(
    "make",
    [cnn, lambda: Holder(a=layers(4)), lambda: Holder(a=layers(4, 8, 16)), lambda: nn.Linear(2, 2)],
    ids=["CNN", "one block", "blocks of differing shapes", "no list"],
)
def test_a_network_without_repeated_blocks_is_refused(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match="found no repeated blocks.*name the list with blocks='...'"):
        find_blocks(make())


def test_lists_inside_of_blocks_do_not_count() -> None:
    network = Holder(body=nn.ModuleList(Experts() for _ in range(2)), head=nn.Linear(4, 2))
    assert find_blocks(network).path == "body"
    assert len(find_blocks(network, "body.1.experts")) == 3  # but may be named


def test_one_list_with_two_paths_is_one_list() -> None:
    body = layers(4, 4)
    assert find_blocks(Holder(backbone=body, alias=body)).container is body


def test_layers_without_parts_count_only_by_name() -> None:
    network = Holder(body=nn.ModuleList(nn.Linear(4, 4) for _ in range(3)))
    with pytest.raises(ValueError, match="found no repeated blocks"):
        find_blocks(network)
    assert len(find_blocks(network, "body")) == 3


def test_finding_again_keeps_what_is_active() -> None:
    network = made("ours")
    find_blocks(network).activate([0, 1])
    assert find_blocks(network).active == (0, 1)


# ---- torch.compile


@pytest.mark.parametrize("name", ["timm_vit", "torch_encoder", "ours", "hf_llama"])
def test_a_compiled_network_recompiles_once_for_each_set_of_active_blocks(name: str) -> None:
    torch._dynamo.reset()
    network = made(name).eval()
    graphs = CountingBackend()
    compiled: Any = torch.compile(network, backend=graphs)
    stack = find_blocks(network)
    counts = []
    for active in [(0,), (0, 1), (1, 3), (0, 1, 2, 3), (0,), (1, 3)]:
        stack.activate(active)
        before = graphs.count
        with torch.no_grad():
            assert torch.equal(run(name, compiled), run(name, network))
            run(name, compiled)
        counts.append(graphs.count - before)
    assert counts[4:] == [0, 0]
    assert counts[:4] == [1, 1, 1, 1]


@pytest.mark.parametrize("name", ["timm_vit", "torch_encoder", "ours"])
def test_blocks_compiled_one_by_one_are_compiled_once(name: str) -> None:
    torch._dynamo.reset()
    network = made(name).eval()
    graphs = CountingBackend()
    stack = find_blocks(network)
    expected = {}
    with torch.no_grad():
        for active in [(0,), (0, 1), (1, 3), (0, 1, 2, 3)]:
            stack.activate(active)
            expected[active] = run(name, network)
        for block in stack.blocks:
            block.compile(backend=graphs)
        for active, output in expected.items():
            stack.activate(active)
            assert torch.equal(run(name, network), output)
    assert graphs.count == 1


class CountingBackend:
    """Runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


def test_every_foreign_module_has_one_list_of_blocks() -> None:
    for name, kind in FOREIGN.items():
        assert find_blocks(build(name)).path == kind.blocks
