"""The one registry of techniques, and of the networks that they are tried on.

A technique has one entry in `CASES`. Four matrices read it:

- `tests/matrices/test_resume.py`: a resumed run is the uninterrupted one, and is not where the mechanism is taken away
- `tests/matrices/test_pairs.py`: two go along and resume, or are refused in one line at setup
- `tests/matrices/test_ddp.py`: two processes agree after every step, and resume
- `tests/matrices/test_networks.py`: it acts on networks of timm, Hugging Face and torch, and leaves them as they were

and so do `test_clock.py` and `test_registry.py` beside them. An entry needs a class, its arguments, a network where it
feels at home, others that it runs on, and the techniques beside which it is refused. Two techniques that go together
meet on the first network that both name.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer

from lit_scale.callbacks import (
    BatchRamp,
    DynamicSparsity,
    EightBitOptimizer,
    ImportanceSampling,
    LargeBatch,
    MaskedTokenSkip,
    MaskLater,
    PatchDropping,
    ProgressiveStacking,
    RandomLTD,
    ResolutionGrowing,
    RhoLoss,
    SelectiveBackprop,
    SequenceLengthWarmup,
    TokenDropping,
)
from lit_scale.technique import Technique
from tests.support.data import MASK, loader, pictures, sized_loader
from tests.support.networks import build, image_model, tiny_mae, viewer
from tests.support.training import Watch, fit, save_every_step

STEPS = 8  # of a run
SAMPLES = 24  # in an epoch, in batches of four
Arguments = dict[str, Any]


# ---- networks


@dataclass(frozen=True)
class Place:
    """A network, and data that fit it."""

    network: Callable[..., LightningModule]  #: takes a seed, and options such as dropout
    data: Callable[..., Any]  #: takes the size of a batch
    library: str  #: whose network it is


def _place(network: Callable[..., Any], data: Callable[..., Any], name: str, library: str) -> Place:
    return Place(functools.partial(network, name), functools.partial(data, size=SAMPLES), library)


def _named(name: str, library: str, **options: Any) -> Place:
    return _place(functools.partial(build, **options), functools.partial(loader, name), name, library)


OURS, TIMM, HUGGING_FACE, TORCH = "lit_scale", "timm", "Hugging Face", "torch"
PLACES: dict[str, Place] = {
    "bert": _named("bert", OURS),
    "autoencoder": Place(tiny_mae, functools.partial(pictures, size=SAMPLES), OURS),
    # short texts
    "hf_bert": _named("hf_bert", HUGGING_FACE),
    "hf_gpt2": _named("hf_gpt2", HUGGING_FACE),
    "torch_encoder": _named("torch_encoder", TORCH),
    # short texts in which tokens are hidden
    "masked_hf_bert": _named("masked_hf_bert", HUGGING_FACE),
    "masked_torch_encoder": _named("masked_torch_encoder", TORCH),
    # matrices that are large enough for state of 8 bits
    "wide_bert": _named("bert", OURS, width=64),
    "wide_hf_bert": _named("hf_bert", HUGGING_FACE, width=64),
    "wide_timm_vit": _named("timm_vit", TIMM, width=64),
    "wide_torch_encoder": _named("torch_encoder", TORCH, width=64),
    # small images
    "timm_vit": _named("timm_vit", TIMM),
    "plain_torch": _named("plain_torch", TORCH),
    # pictures of sixteen patches
    "timm_pictures": _place(viewer, pictures, "timm", TIMM),
    "hf_pictures": _place(viewer, pictures, "hf_vit", HUGGING_FACE),
    "torch_pictures": _place(viewer, pictures, "plain", TORCH),
    # images of any size, from a loader that makes the size it is asked for
    "timm_images": _place(image_model, sized_loader, "timm", TIMM),
    "hf_images": _place(image_model, sized_loader, "hf", HUGGING_FACE),
    "torch_images": _place(image_model, sized_loader, "by_hand", TORCH),
}
ALL_INPUTS = ("hf_bert", "timm_vit", "torch_encoder", "hf_gpt2", "autoencoder", "timm_pictures", "timm_images")


# ---- techniques


@dataclass(frozen=True, kw_only=True)
class Case:
    """How one technique is tried."""

    technique: type[Technique]
    arguments: Arguments | Callable[[Place], Arguments]  #: of the constructor; a function where they hold a network
    home: str  #: the network it is resumed on, and run on in two processes
    others: tuple[str, ...]  #: further networks, in the order of preference
    told: Mapping[str, Arguments] = field(default_factory=dict)  #: arguments that differ on one network
    needs: tuple[str, ...] = ()  #: methods and switches of a module that it cannot do without
    not_foreign: str = ""  #: why it is tried on fewer libraries' networks than all three
    lasting: bool = False  #: whether the trained network is another one until it is let go
    state_matters: bool = False  #: whether a run that resumes without the technique's own state differs
    strategy: str = "ddp"  #: for two processes
    refused: Mapping[str, str] = field(default_factory=dict)  #: techniques beside which it is refused, and why
    plain_steps: Literal["made", "priced", "unknown"] = "made"  #: by its run; by the clock beside it; by neither
    one_price: bool = False  #: whether all of its steps multiply as much
    first: bool = False  #: whether it has to stand in front of the others

    @property
    def name(self) -> str:
        return self.technique.__name__

    @property
    def places(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.home, *self.others)))

    def make(self, place: str = "", **changed: Any) -> Technique:
        """The technique, new, as it is tried on a network."""
        place = place or self.home
        own = self.arguments(PLACES[place]) if callable(self.arguments) else self.arguments
        return self.technique(**(own | self.told.get(place, {}) | changed))


def _same(factor: str, *others: str) -> dict[str, str]:
    return dict.fromkeys(others, f"both change the {factor} of a step; use one of them")


CHOOSE_TOKENS = ("TokenDropping", "RandomLTD", "MaskLater")
HALVES = [(0.0, 0.5), (0.5, 1.0)]  # of what grows: a half in the first half of the run
_CASES = [
    Case(
        technique=BatchRamp,
        arguments={"stages": [(0.0, 4), (0.5, 8)]},
        home="bert",
        others=("wide_bert", *ALL_INPUTS),
        one_price=True,
    ),
    Case(
        technique=LargeBatch,
        arguments={"times": 2, "lr": 0.02},
        home="bert",
        others=("wide_bert", *ALL_INPUTS),
        first=True,  # it would replace the optimizer that another one has put there
        one_price=True,
        plain_steps="unknown",
    ),
    Case(
        technique=ImportanceSampling,
        arguments={"presample": 2, "threshold": 0.0, "look_every": 1},
        home="timm_images",
        others=("wide_bert", *ALL_INPUTS),
        needs=("per_sample_loss",),
        state_matters=True,
        refused=_same("samples", "RhoLoss", "SelectiveBackprop"),
        plain_steps="unknown",
    ),
    Case(
        technique=RhoLoss,
        arguments=lambda place: {"irreducible": place.network(seed=9), "share": 0.5},
        home="timm_images",
        others=("wide_bert", *ALL_INPUTS),
        needs=("per_sample_loss",),
        refused=_same("samples", "SelectiveBackprop"),
        plain_steps="priced",
    ),
    Case(
        technique=SelectiveBackprop,
        arguments={"start": 0.0, "end": 1.0},
        home="bert",
        others=("wide_bert", *ALL_INPUTS),
        needs=("per_sample_loss",),
    ),
    Case(
        technique=MaskedTokenSkip,
        arguments={},
        home="autoencoder",
        others=(),
        needs=("encode_masked",),
        not_foreign="other libraries' autoencoders have no switch encode_masked, and it refuses them",
        refused=_same("tokens", "PatchDropping", "ResolutionGrowing", "SequenceLengthWarmup", *CHOOSE_TOKENS),
        plain_steps="priced",
    ),
    Case(
        technique=PatchDropping,
        arguments={"fraction": 0.5, "tune": 0.25},
        home="timm_pictures",
        others=("hf_pictures", "torch_pictures"),
        told={"torch_pictures": {"embedding": "net.0"}},
        refused=_same("tokens", "ResolutionGrowing", "SequenceLengthWarmup", *CHOOSE_TOKENS),
    ),
    Case(
        technique=ResolutionGrowing,
        arguments={"stages": HALVES},
        home="timm_images",
        others=("hf_images", "torch_images"),
        refused=_same("tokens", "SequenceLengthWarmup", *CHOOSE_TOKENS),
    ),
    Case(
        technique=SequenceLengthWarmup,
        arguments={"stages": HALVES},
        home="hf_gpt2",
        others=("hf_bert", "torch_encoder"),
        not_foreign="timm's networks take images",
        refused=_same("tokens", *CHOOSE_TOKENS),
    ),
    Case(
        technique=TokenDropping,
        arguments={"until": 0.75, "special_ids": [MASK], "beta": 0.5},
        home="bert",
        others=("wide_bert", "masked_hf_bert", "masked_torch_encoder"),
        needs=("per_token_loss",),
        not_foreign="timm's networks take images",
        state_matters=True,
        refused=_same("tokens", "RandomLTD", "MaskLater"),
    ),
    Case(
        technique=RandomLTD,
        arguments={},
        home="bert",
        others=("wide_bert", "hf_bert", "timm_vit", "torch_encoder", "hf_gpt2"),
        refused=_same("tokens", "MaskLater"),
    ),
    Case(
        technique=MaskLater,
        arguments={},
        home="bert",
        others=("wide_bert", "masked_hf_bert", "masked_torch_encoder"),
        not_foreign="timm's networks take images",
        lasting=True,
        plain_steps="priced",
    ),
    Case(
        technique=ProgressiveStacking,
        arguments={"stages": HALVES},
        home="bert",
        others=("wide_bert", *ALL_INPUTS),
        told={"autoencoder": {"blocks": "encoder.blocks"}},
    ),
    Case(
        technique=DynamicSparsity,
        arguments={"density": 0.5, "every": 2},
        home="bert",
        others=("wide_bert", *ALL_INPUTS),
        told={"hf_gpt2": {"granularity": "weight"}},  # its layers are no nn.Linear, whose units could be left out
        state_matters=True,
        plain_steps="priced",
    ),
    Case(
        technique=EightBitOptimizer,
        arguments={},
        home="wide_bert",
        others=("wide_hf_bert", "wide_timm_vit", "wide_torch_encoder", *ALL_INPUTS),
        one_price=True,
        plain_steps="unknown",
    ),
]
CASES: dict[str, Case] = {case.name: case for case in _CASES}


# ---- pairs


@dataclass(frozen=True)
class Pair:
    """Two techniques in the order in which they stand, and where they meet."""

    one: Case
    other: Case

    @property
    def name(self) -> str:
        return f"{self.one.name}-{self.other.name}"

    @property
    def why_refused(self) -> str | None:
        """What the refusal says; None: they go along."""
        return self.one.refused.get(self.other.name) or self.other.refused.get(self.one.name)

    @property
    def place(self) -> str:
        """The first network that both are tried on, by the one that names fewer."""
        few, many = sorted((self.one, self.other), key=lambda case: len(case.places))
        return next(place for place in few.places if place in many.places)

    @property
    def in_order(self) -> bool:
        """Whether they stand as in the registry."""
        return _CASES.index(self.one) < _CASES.index(self.other)

    def make(self) -> list[Technique]:
        return [self.one.make(self.place), self.other.make(self.place)]


def pairs() -> list[Pair]:
    """Every two techniques in both orders, but for those that have to stand in front."""
    both = [Pair(one, other) for one in _CASES for other in _CASES if one is not other]
    return [pair for pair in both if not pair.other.first]


# ---- a run


def train(
    place: str,
    root: Path,
    *techniques: Technique,
    resume: Path | None = None,
    save: Path | None = None,
    batch_size: int = 4,
    **options: Any,
) -> tuple[Trainer, Watch]:
    """`STEPS` steps of a network with these techniques, saved after each, or resumed; from other weights then."""
    where, watch = PLACES[place], Watch()
    module, data = where.network(seed=1 if resume else 0), where.data(batch_size=batch_size)
    saving = [save_every_step(save)] if save else []
    options = {"max_steps": STEPS} | options
    trainer = fit(module, data, root, watch, *techniques, *saving, resume=resume, **options)
    assert trainer.global_step == options["max_steps"]
    return trainer, watch
