"""What every defense of the registry, and stacks of them, must do. A defense joins by being registered."""

import inspect
import os

import pytest
import torch
from torch import nn

from helpers import Declared, Linear, images
from queryfoil import rng
from queryfoil.defenses import DEFENSES
from queryfoil.defenses.aaa import AAA
from queryfoil.defenses.boundary import BoundaryNoise
from queryfoil.defenses.coarse import HighConfidence, RoundedScores, TopK
from queryfoil.defenses.dent import DENT
from queryfoil.defenses.dld import DLD
from queryfoil.defenses.noise import InputNoise
from queryfoil.defenses.pni import PNI
from queryfoil.defenses.preprocess import JPEG
from queryfoil.defenses.reverse_sigmoid import ReverseSigmoid
from queryfoil.defenses.rfd import RFD
from queryfoil.defenses.rls import RLS
from queryfoil.defenses.terraces import Terraces
from queryfoil.oracle import answers, as_log_scores


class Behind(nn.Module):
    """A model behind a batch norm, a convolution and a stage that change nothing, for defenses that need them."""

    def __init__(self, model):
        super().__init__()
        self.bn, self.conv, self.model = nn.BatchNorm2d(1, eps=0), nn.Conv2d(1, 1, 3, 1, 1, bias=False), model
        self.layer1 = nn.Identity()
        nn.init.dirac_(self.conv.weight)
        self.output = getattr(model, "output", "logits")
        for module in (self, self.bn, self.conv, self.layer1):
            module.training = model.training

    def forward(self, x):
        return self.model(self.layer1(self.conv(self.bn(x))))


def needed(name, model):
    return Behind(model) if name in ("dent", "pni", "rfd") else model


def fitted(name, model):
    """Settings of a defense that has no usual ones: for terraces, one border for all classes of the model."""
    if name != "terraces":
        return {}
    last = [parameter for parameter in model.parameters() if parameter.ndim == 1][-1:]
    classes = len(last[0]) if last else 3
    return {"group": [0] * classes, "borders": [[0.5]], "shares": [[[0.5], [0.9]]]}


BUILDS = {
    **{
        name: lambda model, name=name, kind=kind: kind(needed(name, model), **fitted(name, model))
        for name, kind in DEFENSES.items()
    },
    "aaa sine": lambda model: AAA(model, curve="sine", tau=2.0, temperature=1.5),
    "aaa adam": lambda model: AAA(model, solver="adam", tau=2.0),
    "aaa(noise)": lambda model: AAA(InputNoise(model)),
    "noise(aaa)": lambda model: InputNoise(AAA(model)),
    "dent, one step": lambda model: DENT(Behind(model), steps=1),
    "pni": lambda model: PNI(Behind(model), alpha=0.1),
    "pni, layer-wise": lambda model: PNI(Behind(model), channelwise=False, alpha=0.1),
    "aaa(dent)": lambda model: AAA(DENT(Behind(model)), tau=2.0),
    "aaa(jpeg)": lambda model: AAA(JPEG(model), tau=2.0),
    "aaa(aaa)": lambda model: AAA(AAA(model, tau=2.0)),
    "dld, narrow": lambda model: DLD(model, tau=1.0, low_slope=0.5, step=0.5, high_ratio=0.2),
    "rls normal": lambda model: RLS(model, law="normal"),
    "rfd": lambda model: RFD(Behind(model), std=0.03),
    "rfd relative": lambda model: RFD(Behind(model), std=0.05, layers="layer1", relative=True),
    # more sure than 0.3 are all answers of the linear model
    "boundary_noise": lambda model: BoundaryNoise(model, theta=0.99),
    "rounded, 1 decimal": lambda model: RoundedScores(model, decimals=1),
    "rounded as in ART": lambda model: RoundedScores(model, keep_label=False),
    "reverse sigmoid as in ART": lambda model: ReverseSigmoid(model, keep_label=False),
    "top 2": lambda model: TopK(model, k=2, rest="equal"),
    "high confidence, the rest equal": lambda model: HighConfidence(model, threshold=0.9, rest="equal"),
    "high confidence as in ART": lambda model: HighConfidence(model, keep_label=False),
    "aaa(top_k)": lambda model: AAA(TopK(model), tau=2.0),
    "terraces, two places": lambda model: Terraces(
        model, **fitted("terraces", model) | {"shares": [[[0.5, 0.3], [0.8, 0.12]]]}
    ),
    "rounded(rls)": lambda model: RoundedScores(RLS(model)),
}
BAD = {  # settings that each defense must refuse
    "aaa": [
        {"curve": "cosine"},
        {"solver": "sgd"},
        {"tau": 0.0},
        {"tau": float("nan")},
        {"alpha": -0.1},
        {"beta": -1.0},
        {"beta": float("inf")},
        {"temperature": 0.0},
        {"steps": 50},  # no effect on the exact solver
        {"lr": 0.5},
        {"solver": "adam", "steps": -1},
        {"solver": "adam", "lr": 0.0},
    ],
    "terraces": [
        {"group": [0] * 9 + [2]},
        {"borders": [[0.5, 0.5]]},
        {"borders": [[-0.5]]},
        {"borders": [[float("nan")]]},
        {"borders": [[0.5], [0.5]]},
        {"shares": [[[0.5]]]},
        {"shares": [[[0.5], [0.05]]]},  # below that of the other classes
        {"shares": [[[0.5], [1.1]]]},
        {"shares": [[[0.5], [0.5, 0.2]]]},
        {"shares": [[[0.2, 0.5], [0.5, 0.2]]]},
    ],
    "temperature": [{"temperature": 0.0}, {"temperature": float("nan")}, {"temperature": float("inf")}],
    "input_noise": [{"std": -0.1}, {"std": float("nan")}, {"std": float("inf")}],
    "output_noise": [{"std": -0.1}, {"std": float("nan")}, {"std": float("inf")}],
    "dent": [{"steps": -1}, {"steps": 1.5}],
    "pni": [{"alpha": -0.1}, {"alpha": float("inf")}],
    "bit_depth": [{"bits": 0}, {"bits": 9}, {"bits": 2.0}],
    "jpeg": [{"quality": 0}, {"quality": 96}, {"quality": 75.0}],
    "median": [{"size": 1}, {"size": 8}, {"size": True}],
    "total_variation": [{"keep": 0.0}, {"keep": 1.1}, {"weight": 0.0}, {"weight": float("inf")}, {"steps": 0}],
    "dld": [
        {"tau": 0.0},
        {"tau": float("inf")},
        {"low_slope": 0.0},  # the low line would end in a tie
        {"low_slope": 1.0},
        {"step": 0.0},
        {"step": 1.1},
        {"high_ratio": -0.1},
        {"high_ratio": 1.1},
        {"high_ratio": float("nan")},
    ],
    "rls": [{"law": "gamma"}],
    "rfd": [{"std": -0.1}, {"std": float("nan")}, {"layers": "layer9"}, {"layers": ["layer1", "layer9"]}],
    "boundary_noise": [{"theta": 0.0}, {"theta": 1.1}, {"std": -0.1}, {"std": float("inf")}],
    "rounded": [{"decimals": 0}, {"decimals": 7}, {"decimals": 2.5}, {"decimals": True}],
    "reverse_sigmoid": [{"beta": 0.0}, {"gamma": 0.0}, {"gamma": float("inf")}, {"beta": float("nan")}],
    "top_k": [{"k": 0}, {"k": 1.5}, {"rest": "none"}],
    "label_only": [],
    "high_confidence": [
        {"threshold": 0.0},
        {"threshold": 1.1},
        {"rest": "none"},
        {"rest": "equal", "keep_label": False},
    ],
}

KEEPING = {
    name: build
    for name, build in BUILDS.items()
    if (model := build(Linear())) and model.keeps_label and model.deterministic
}

SHOWS_PROBS = ("rounded", "top_k", "label_only", "high_confidence")
"""Show probabilities, whatever the model gives."""

UNNORMALIZED = ("rounded as in ART", "high confidence as in ART")

every_defense = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)


class Certain(nn.Module):
    """Sure of class 1, with a probability of zero for the others."""

    output = "probs"

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype
        self.eval()

    def forward(self, x):
        return torch.tensor([0.0, 1.0, 0.0], dtype=self.dtype) + 0 * x.mean((1, 2, 3)).to(self.dtype)[:, None]


def ask(model, x, ids=None, queries=None):
    """Scores of a batch as the oracle asks for them: random draws by id and query number."""
    ids = torch.arange(len(x)) if ids is None else ids
    queries = torch.ones_like(ids) if queries is None else queries
    with torch.no_grad(), rng.rows(0, ids, queries):
        return model(x)


@every_defense
@pytest.mark.parametrize("classes", [3, 10, 100])
def test_scores_keep_their_shape_and_type_and_are_finite(build, classes):
    scores = ask(build(Linear(classes=classes)), images(5))
    assert scores.shape == (5, classes)
    assert scores.dtype == torch.float32
    assert bool(scores.isfinite().all())


@every_defense
def test_rows_do_not_depend_on_their_batch(build):
    model, x, ids = build(Linear()), images(9), torch.arange(9) + 50
    whole = ask(model, x, ids)
    order = torch.tensor([4, 8, 0, 1, 7, 2, 6, 5, 3])
    assert torch.equal(ask(model, x[order], ids[order]), whole[order])
    for i in range(9):
        assert torch.equal(ask(model, x[i : i + 1], ids[i : i + 1]), whole[i : i + 1])
    assert model.rowwise is True


@every_defense
def test_a_call_changes_neither_weights_nor_mode_nor_input(build):
    model, x = Linear(), images(4)
    defended = build(model)
    before, image = {name: value.clone() for name, value in model.state_dict().items()}, x.clone()
    ask(defended, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(x, image)
    assert not any(module.training for module in defended.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


@every_defense
@pytest.mark.parametrize("training", [True, False])
def test_construction_inherits_the_mode_and_leaves_it(build, training):
    model = Linear().train(training)
    defended = build(model)
    assert defended.training is training
    assert model.training is training
    assert not any(module.training for module in defended.eval().modules())


@every_defense
def test_it_works_with_and_without_gradients_and_in_inference_mode(build):
    model, x, ids = build(Linear()), images(4), torch.arange(4)
    reference = ask(model, x)
    for mode in (torch.enable_grad, torch.inference_mode):
        with mode(), rng.rows(0, ids, torch.ones_like(ids)):
            assert torch.equal(model(x), reference)
    with torch.inference_mode(), rng.rows(0, ids, torch.ones_like(ids)):
        assert torch.equal(model(x.clone()), reference)  # an inference tensor


@every_defense
def test_whether_it_is_deterministic_is_declared(build):
    model, x, ids = build(Linear()), images(8), torch.arange(8)
    first, second = (ask(model, x, ids, torch.full_like(ids, query)) for query in (1, 2))
    assert torch.equal(first, second) is model.deterministic
    assert torch.equal(ask(model, x, ids), first)  # random ones are a function of the query


@every_defense
def test_a_declared_label_is_kept_on_real_images(build, network, clothes):
    model, x = build(network), clothes.images[:150]
    same = ask(model, x).argmax(1) == ask(model.model, x).argmax(1)
    assert type(model.keeps_label) is bool
    if model.keeps_label:
        assert bool(same.all())
    else:
        assert float(same.double().mean()) > 0.8


@pytest.mark.parametrize("build", KEEPING.values(), ids=KEEPING)
@pytest.mark.parametrize("classes", [3, 10])
def test_a_declared_label_is_kept_where_classes_are_tied(build, classes):
    grey = torch.full((3, 1, 8, 8), 128 / 255)
    assert not bool(Linear(classes=classes)(grey).any())
    assert ask(build(Linear(classes=classes)), grey).argmax(1).tolist() == [0, 0, 0]


@every_defense
@pytest.mark.parametrize("output", ["probs", "log_probs", "logits"])
def test_scores_stay_what_the_model_declares_them_to_be(build, output):
    inner = Declared(Linear(), output)
    model = build(inner)
    kinds = tuple(DEFENSES[name] for name in SHOWS_PROBS)
    shows_probs = any(isinstance(layer, kinds) for layer in model.modules())
    normalized = build not in [BUILDS[name] for name in UNNORMALIZED]
    assert model.output == ("probs" if shows_probs else output)
    x = images(20)
    scores = ask(model, x)
    if model.output == "probs":
        assert bool((scores >= 0).all())
        if normalized:
            torch.testing.assert_close(scores.sum(1), torch.ones(20))
    if model.output == "log_probs":
        torch.testing.assert_close(scores.logsumexp(1), torch.zeros(20), atol=1e-5, rtol=0)
    if model.keeps_label:
        assert torch.equal(scores.argmax(1), ask(model.model, x).argmax(1))


@every_defense
def test_probabilities_and_their_logarithms_are_protected_alike(build):
    x = images(20)
    models = [build(Declared(Linear(), output)) for output in ("probs", "log_probs")]
    # of a probability below 1e-38 there is no logarithm
    probs, log_probs = (as_log_scores(ask(model, x), model.output).clamp_min(-80) for model in models)
    torch.testing.assert_close(probs, log_probs, atol=1e-3, rtol=1e-3)


@every_defense
def test_an_unknown_kind_of_output_raises(build):
    x, ids = images(2), torch.arange(2)
    inner = Linear()
    inner.output = "prob"
    with pytest.raises(ValueError, match=r"expected a model's output to be logits, log_probs or probs.*got 'prob'"):
        answers(build(inner), x, ids, ids)


@pytest.mark.parametrize("name", DEFENSES)
def test_settings_that_make_no_sense_raise(name):
    for settings in BAD[name]:
        with pytest.raises(ValueError, match=r"expected|have no effect"):
            DEFENSES[name](needed(name, Linear()), **{**fitted(name, Linear()), **settings})


@every_defense
def test_weights_survive_a_round_trip_through_the_state_dict(build):
    x = images(4)
    source, target = build(Linear(seed=0)), build(Linear(seed=1))
    assert not torch.equal(ask(source, x), ask(target, x))
    target.load_state_dict(source.state_dict())
    assert torch.equal(ask(source, x), ask(target, x))


@pytest.mark.parametrize("name", DEFENSES)
def test_the_first_argument_is_the_model_and_the_repr_shows_the_settings(name):
    kind = DEFENSES[name]
    model, *settings = inspect.signature(kind).parameters.values()
    assert model.name == "model"
    assert all(setting.kind is setting.KEYWORD_ONLY for setting in settings)
    shown = repr(kind(needed(name, Linear()), **fitted(name, Linear())))
    for setting in settings:
        if setting.name not in ("steps", "lr"):  # refused by AAA's exact solver
            assert f"{setting.name}=" in shown
    assert "Linear()" in shown


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@every_defense
def test_zero_probabilities_of_any_type_stay_finite(build, dtype):
    scores = ask(build(Certain(dtype)), images(4))
    assert scores.dtype in (dtype, torch.float32)  # AAA does not cut probabilities back to half precision
    assert bool(scores.isfinite().all())
    assert scores.argmax(1).tolist() == [1] * 4


def test_the_repr_shows_the_values():
    assert "curve='sine', tau=2.5, alpha=0.7" in repr(AAA(Linear(), curve="sine", tau=2.5))
    assert "std=0.05" in repr(InputNoise(Linear(), std=0.05))


def test_the_repr_tells_settings_of_the_adam_solver_apart():
    assert repr(AAA(Linear(), solver="adam", steps=50)) != repr(AAA(Linear(), solver="adam"))


# input noise


class Pixels(nn.Flatten):
    """Answers with what it sees."""


def test_input_noise_has_the_standard_deviation_it_is_given():
    x = torch.full((200, 1, 16, 16), 128 / 255)
    seen = ask(InputNoise(Pixels().eval(), std=0.05), x)
    n = seen.numel()
    assert abs(float(seen.std()) - (0.05**2 + 1 / 12 / 255**2) ** 0.5) < 4 * 0.05 / (2 * n) ** 0.5
    assert abs(float(seen.mean()) - 127.5 / 255) < 4 * 0.05 / n**0.5  # half a level lower: floored


def test_input_noise_is_clipped_and_floored_to_8_bits():
    x = torch.arange(256).float().div(255).view(1, 1, 16, 16)
    seen = ask(InputNoise(Pixels().eval(), std=0.2), x)
    assert torch.equal((seen * 255).round() / 255, seen)
    assert float(seen.min()) == 0
    assert float(seen.max()) == 1


def test_input_noise_of_zero_changes_nothing():
    x = images(3)
    assert torch.equal(ask(InputNoise(Linear(), std=0.0), x), Linear()(x))


def test_input_noise_in_a_service_is_fresh_at_every_call():
    model, x = InputNoise(Linear()), images(3)
    assert not torch.equal(model(x), model(x))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # torch has threads, but the child needs none
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork processes")
def test_input_noise_differs_between_forked_workers_of_a_service():
    def noise_of_a_child():
        source, sink = os.pipe()
        child = os.fork()
        if not child:
            os.write(sink, rng.noise_like(torch.zeros(1, 8)).numpy().tobytes())
            os._exit(0)
        os.waitpid(child, 0)
        os.close(sink)
        with os.fdopen(source, "rb") as pipe:
            return pipe.read()

    assert noise_of_a_child() != noise_of_a_child()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.filterwarnings("ignore:with two classes")
def test_aaa_keeps_the_label_of_probabilities_in_half_precision(dtype, classes):
    class Confident(nn.Module):
        output = "probs"

        def forward(self, x):
            return x.softmax(1).to(dtype)

    x = torch.randn(5000, classes, generator=torch.Generator().manual_seed(0))
    model = Confident().eval()
    assert torch.equal(AAA(model, tau=0.5, beta=1.0)(x).argmax(1), model(x).argmax(1))
