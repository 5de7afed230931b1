"""8-bit optimizer state: what is quantised, that files and growth keep it, and LAMB's update against the paper's."""

import copy
import io
from typing import Any

import pytest
import torch
from timm.optim import Lamb, Lion
from torch import Tensor, nn
from torch.optim import Optimizer

import lit_scale.factors.eight_bit
from lit_scale.factors.eight_bit import EIGHT_BIT, make_eight_bit, to_eight_bit
from lit_scale.factors.optimizers import create_optimizer, state_bytes, transfer_state
from lit_scale.models import GPT
from tests.support.equality import assert_same

pytestmark = [pytest.mark.filterwarnings("ignore")]

WIDTH = 64


def gpt(seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(vocab_size=70, max_length=8, depth=2, width=WIDTH, num_heads=2)


def step(module: GPT, optimizer: Optimizer, seed: int) -> float:
    ids = torch.randint(70, (4, 8), generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    loss = module.per_sample_loss({"input_ids": ids}).mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def trained(name: str, steps: int = 3, **options: Any) -> tuple[GPT, Any]:
    module = gpt()
    optimizer = create_optimizer(module, name, lr=1e-3, weight_decay=0.1, **options)
    for seed in range(steps):
        step(module, optimizer, seed)
    return module, optimizer


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_matrices_have_8_bits_and_embeddings_and_small_tensors_32(name: str) -> None:
    module, optimizer = trained(name)
    for key, parameter in module.named_parameters():
        state = optimizer.state[parameter]
        small = parameter.numel() < 4096 or key == "embedding.tokens.weight"
        assert state["state1"].dtype == (torch.float32 if small else torch.uint8), key
        assert small or state["absmax1"].shape[-1] == -(-parameter.numel() // 256)


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_it_follows_its_own_32_bit_form(name: str) -> None:
    """The same updates with 32-bit state, but for what rounding to 8 bits does to them; and rounding does something."""
    (one, _), (other, optimizer) = trained(name, 5), trained(name, 5, min_8bit_size=2**31)
    start, moved, apart = gpt(), 0.0, 0.0
    for p, q, before in zip(one.parameters(), other.parameters(), start.parameters(), strict=True):
        moved += (q - before).square().sum().item()
        apart += (p - q).square().sum().item()
    assert all(state["state1"].dtype == torch.float32 for state in optimizer.state.values())
    assert 0 < apart < (0.3**2) * moved


def test_state_is_a_quarter_and_a_64th_of_the_32_bit_form() -> None:
    net = nn.Linear(512, 512, bias=False)
    sizes = {}
    for name in ("adamw", "adamw8bit", "lion", "lion8bit"):
        optimizer = create_optimizer(net, name, lr=1e-3)
        net(torch.ones(1, 512)).sum().backward()
        optimizer.step()
        sizes[name] = state_bytes([optimizer])
    tables = 256 * 4  # the levels of the moments, once for all parameters
    assert sizes["adamw8bit"] == 512 * 512 * 2 * (1 + 4 / 256) + 2 * tables
    assert sizes["lion8bit"] == 512 * 512 * (1 + 4 / 256) + tables
    assert sizes["adamw"] == 512 * 512 * 8 + 4  # and the step
    assert sizes["lion"] == 512 * 512 * 4


# ---- LAMB


def lamb_of_the_paper(
    weights: list[Tensor], gradients: list[list[Tensor]], decays: list[float], lr: float
) -> list[Tensor]:
    """You et al. 2020, algorithm 2, with the clipping of its section 4: one list of gradients a step."""
    first = [torch.zeros_like(w) for w in weights]
    second = [torch.zeros_like(w) for w in weights]
    for t, grads in enumerate(gradients, 1):
        norm = sum(float(g.square().sum()) for g in grads) ** 0.5
        for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
            g = g / max(1.0, norm)
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.999 * second[i] + 0.001 * g * g
            r = (first[i] / (1 - 0.9**t)) / ((second[i] / (1 - 0.999**t)).sqrt() + 1e-6)
            u = r + decays[i] * w
            ratio = float(w.norm() / u.norm()) if decays[i] and w.norm() > 0 and u.norm() > 0 else 1.0
            weights[i] = w - lr * ratio * u
    return weights


@pytest.mark.parametrize("name", ["lamb", "lamb8bit"])
def test_lamb_is_that_of_the_paper(name: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3, bias=False))
    with torch.no_grad():
        net[1].get_parameter("weight").zero_()  # of norm 0, so its ratio is 1
    options = {"min_8bit_size": 2**31} if name == "lamb8bit" else {}
    optimizer = create_optimizer(net, name, lr=0.02, weight_decay=0.1, **options)
    start = [p.detach().double().clone() for p in net.parameters()]
    gradients = [[torch.randn_like(p) * 10.0 ** (1 - n) for p in net.parameters()] for n in range(4)]
    for grads in gradients:
        for p, g in zip(net.parameters(), grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        assert_same([p.grad for p in net.parameters()], grads)
    expected = lamb_of_the_paper(start, [[g.double() for g in grads] for grads in gradients], [0.1, 0.0, 0.1], 0.02)
    for p, w in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach().double(), w, rtol=1e-5, atol=1e-6)


def test_lamb_s_step_is_one_step_to_whom_it_calls() -> None:
    """Also where a plain Adam8bit of the process has made torch hook the step that LAMB's calls."""
    import bitsandbytes.optim

    bitsandbytes.optim.Adam8bit([nn.Parameter(torch.zeros(4))])
    net = nn.Linear(64, 64)
    optimizer = create_optimizer(net, "lamb8bit", lr=1e-2)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    net(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    assert calls == ["before", "after"]
    assert all(optimizer.state[p] for p in net.parameters())


@pytest.mark.parametrize("name", ["lamb", "lamb8bit", "lars"])
def test_matrices_are_adapted_without_decay_too_and_vectors_never(name: str) -> None:
    """A matrix of twice the size moves twice as far, a vector as far as ever."""
    moved = []
    for scale in (1.0, 2.0):
        torch.manual_seed(0)
        net = nn.Linear(64, 64)
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(scale)
        before = [p.detach().clone() for p in net.parameters()]
        optimizer = create_optimizer(net, name, lr=1e-3, weight_decay=0.0)
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        moved.append([(p.detach() - b).norm() for p, b in zip(net.parameters(), before, strict=True)])
    torch.testing.assert_close(moved[1][0], 2 * moved[0][0], rtol=1e-4, atol=0)
    torch.testing.assert_close(moved[1][1], moved[0][1], rtol=1e-4, atol=0)


def test_lars_is_that_of_the_paper() -> None:
    """You et al. 2017, algorithm 1: v <- m v + rate 0.001 |w| / (|g| + decay |w|) (g + decay w); w <- w - v."""
    torch.manual_seed(0)
    net = nn.Linear(6, 5)
    optimizer = create_optimizer(net, "lars", lr=0.5, weight_decay=0.1)
    weights = [p.detach().double().clone() for p in net.parameters()]
    velocity = [torch.zeros_like(w) for w in weights]
    for _ in range(4):
        for i, p in enumerate(net.parameters()):
            p.grad = torch.randn_like(p)
            g, w, decay = p.grad.double(), weights[i], 0.1 if p.ndim > 1 else 0.0
            local = 0.001 * w.norm() / (g.norm() + decay * w.norm()) if decay else 1.0
            velocity[i] = 0.9 * velocity[i] + 0.5 * local * (g + decay * w)
            weights[i] = w - velocity[i]
        optimizer.step()
    for p, w in zip(net.parameters(), weights, strict=True):
        torch.testing.assert_close(p.detach().double(), w, rtol=1e-5, atol=1e-6)


# ---- files and growth


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_a_file_brings_every_bit_back(name: str) -> None:
    module, optimizer = trained(name)
    file = io.BytesIO()
    torch.save({"weights": module.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    twin = gpt(seed=1)
    twin.load_state_dict(loaded["weights"])
    again = create_optimizer(twin, name, lr=7.0, weight_decay=0.7)
    again.load_state_dict(loaded["optimizer"])
    for seed in range(3, 6):
        assert step(module, optimizer, seed) == step(twin, again, seed)
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p].keys() == again.state[q].keys()
        for key, value in optimizer.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(again.state[q][key])), key


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_growth_copies_quantised_state(name: str) -> None:
    module, optimizer = trained(name)
    one, other = module.encoder.blocks[0], module.encoder.blocks[1]
    before = copy.deepcopy({key: optimizer.state[p] for key, p in one.named_parameters()})
    with torch.no_grad():
        pairs = list(zip(one.parameters(), other.parameters(), strict=True))
        for source, target in pairs:
            target.copy_(source)
            source.grad, target.grad = torch.ones_like(source), torch.ones_like(source)
    transfer_state([optimizer], pairs)
    kept = {key: optimizer.state[p] for key, p in other.named_parameters()}
    assert any(state["state1"].dtype == torch.uint8 for state in kept.values())
    for key, state in kept.items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(before[key][n])) for n, v in state.items())
    optimizer.step()
    assert all(torch.equal(source, target) for source, target in pairs)  # and so is every later step


# ---- the 8-bit form of another optimizer


@pytest.mark.parametrize("name", ["adamw", "lamb", "lion"])
def test_the_8_bit_form_takes_groups_rates_and_decays_along(name: str) -> None:
    module = gpt()
    plain = create_optimizer(module, name, lr=1e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(plain, max_lr=0.5, total_steps=10)
    made = to_eight_bit(plain)
    direct = create_optimizer(module, f"{name}8bit", lr=1e-3, weight_decay=0.1)
    assert type(made) is type(direct)
    for group, old, expected in zip(made.param_groups, plain.param_groups, direct.param_groups, strict=True):
        assert group["params"] == old["params"]
        assert [id(p) for p in group["params"]] == [id(p) for p in expected["params"]]
        assert {key: group[key] for key in ("weight_decay", "betas")} == {
            key: old.get(key, expected[key]) for key in ("weight_decay", "betas")
        }
        assert group["max_lr"] == 0.5
        assert group["lr"] == schedule.get_last_lr()[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), "8-bit form of Adam does not have weight_decay"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "8-bit form of AdamW does not have amsgrad"),
        (lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True), "8-bit form of SGD does not have nesterov"),
        (lambda p: torch.optim.SGD(p, 0.1), "SGD without momentum has no state"),
        (lambda p: Lamb(p, bias_correction=False), "8-bit form of Lamb does not have bias_correction=False"),
        (lambda p: Lamb(p, grad_averaging=False), "8-bit form of Lamb does not have grad_averaging=False"),
        (lambda p: Lamb(p, corrected_weight_decay=True), "8-bit form of Lamb does not have corrected_weight_decay"),
        (lambda p: Lion(p, corrected_weight_decay=True), "8-bit form of Lion does not have corrected_weight_decay"),
        (lambda p: Lion(p, maximize=True), "8-bit form of Lion does not have maximize"),
        (lambda p: torch.optim.Rprop(p), "no 8-bit form of torch.optim.rprop.Rprop; configure one of Adam, AdamW"),
    ],
)
def test_what_has_no_8_bit_form_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_eight_bit(make(nn.Linear(2, 2).parameters()))


def test_a_device_without_an_8_bit_update_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    message = (
        "optimizer='lion8bit': bitsandbytes .* makes no 8-bit update here .*use optimizer='lion', or train on a CUDA"
    )
    with torch.device("meta"):
        net = nn.Linear(64, 64)
    with pytest.raises(ValueError, match=message):
        create_optimizer(net, "lion8bit", lr=1e-3)

    def missing(name: str) -> Any:
        raise ImportError("No module named 'bitsandbytes'")

    monkeypatch.setattr(lit_scale.factors.eight_bit, "_kind", missing)
    with pytest.raises(ValueError, match=message):
        make_eight_bit("lion8bit", [{"params": list(nn.Linear(64, 64).parameters())}], lr=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", EIGHT_BIT)
def test_on_a_gpu_it_trains_and_comes_back_from_a_file(name: str) -> None:
    module = gpt().cuda()
    optimizer = create_optimizer(module, name, lr=1e-3, weight_decay=0.1)
    ids = torch.randint(70, (4, 8), device="cuda")

    def one(net: GPT, its: Any) -> float:
        its.zero_grad()
        loss = net.per_sample_loss({"input_ids": ids}).mean()
        loss.backward()
        its.step()
        return loss.item()

    losses = [one(module, optimizer) for _ in range(5)]
    assert losses[-1] < losses[0]
    twin = copy.deepcopy(module)
    again = create_optimizer(twin, name, lr=1e-3, weight_decay=0.1)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [one(module, optimizer) for _ in range(3)] == [one(twin, again) for _ in range(3)]
