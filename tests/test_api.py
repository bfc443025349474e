"""The library's front: its names, `attack`, and the small helpers behind."""

import dataclasses
import types

import pytest
import torch

import queryfoil as qf
from helpers import Linear, Watch, images, labels_of
from queryfoil import checks, files
from queryfoil.attacks import PRESETS, build
from queryfoil.attacks.square import Square
from queryfoil.run import confirm, run
from queryfoil.task import Task

NEVER = qf.metrics.NEVER


def test_the_package_exports_exactly_its_documented_names():
    public = {
        name
        for name, value in vars(qf).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)  # submodules appear as they are used
    }
    assert public == {
        "AAA",
        "ATTACKS",
        "DATASETS",
        "DEFENSES",
        "Fit",
        "Flag",
        "InputNoise",
        "MODELS",
        "Result",
        "TerraceFit",
        "Terraces",
        "attack",
        "check",
        "disguise",
        "fit",
        "load_fit",
        "protect",
    }
    assert all(isinstance(module, types.ModuleType) for module in (qf.data, qf.metrics, qf.models))
    assert qf.__version__.count(".") == 2


@pytest.fixture(scope="module")
def attacked():
    """A linear model, 20 images of which the first is wrong from the start, their labels, and 40 queries on each."""
    model, x = Linear(), images(20)
    labels = labels_of(model, x)
    labels[0] = (labels[0] + 1) % 10
    return model, x, labels, qf.attack(model, x, labels, budget=40, seed=3)


def test_attack_is_the_run_of_the_attack_it_names(attacked):
    model, x, labels, result = attacked
    same = run(Square(), model, Task.create(x, labels, seed=3), 40)
    for field in ("fooled_at", "queries", "adversarial", "clean_scores"):
        assert torch.equal(getattr(result, field), getattr(same, field))
    assert result.budget == 40


def test_attack_passes_every_option_on(attacked):
    model, x, labels, _ = attacked
    targets = (labels + 1) % 10
    options = {"norm": "linf", "eps": 4 / 255, "targets": targets, "loss": "cross_entropy", "seed": 5}
    result = qf.attack(model, x, labels, "square", budget=30, p_init=0.3, horizon=500, **options)
    same = run(Square(p_init=0.3, horizon=500), model, Task.create(x, labels, **options), 30)
    assert torch.equal(result.fooled_at, same.fooled_at)
    assert torch.equal(result.adversarial, same.adversarial)


def test_a_result_counts_as_its_fields_say(attacked):
    _, x, _, result = attacked
    assert result.fooled_at[0] == 1
    assert result.queries.tolist() == result.fooled_at.clamp(max=40).tolist()
    for q in (1, 2, 20, 40):
        assert result.accuracy(q) == sum(at > q for at in result.fooled_at.tolist()) / 20
    assert result.accuracy() == result.accuracy(40)
    assert 0 < result.accuracy() < result.accuracy(1) == 0.95
    assert result.average_queries() == sum(min(at, 40) for at in result.fooled_at.tolist()[1:]) / 19
    assert result.adversarial.shape == x.shape
    assert result.clean_scores.shape == (20, 10)
    assert result.seconds > 0


@pytest.mark.parametrize("q", [0, -1, 41])
def test_asking_for_more_queries_than_were_made_raises(attacked, q):
    result = attacked[-1]
    for figure in (result.accuracy, result.average_queries):
        with pytest.raises(ValueError, match=rf"expected 1 <= q <= 40.*got {q}"):
            figure(q)


def test_a_result_is_frozen_and_its_docstring_names_what_it_holds(attacked):
    with pytest.raises(dataclasses.FrozenInstanceError):
        attacked[-1].budget = 3
    for field in ("fooled_at", "queries", "adversarial", "clean_scores"):
        assert f"{field}: (N" in qf.Result.__doc__


def test_the_docstring_of_a_result_names_all_of_its_fields():
    for field in dataclasses.fields(qf.Result):
        assert f"{field.name}:" in qf.Result.__doc__


BAD = {
    "attack": ({"attack": "sqare"}, "unknown attack 'sqare': expected one of .*did you mean 'square'"),
    "hyper-parameter": ({"p_int": 0.1}, "square does not take these hyper-parameters: .*p_int"),
    "hyper-parameter's value": ({"p_init": 2.0}, "expected p_init"),
    "acceptance rule": ({"accept": "nope"}, "unknown acceptance rule 'nope': expected one of"),
    "norm": ({"norm": "l1"}, "unknown norm 'l1': expected one of l2, linf"),
    "acceptance rule of an attack without": (
        {"attack": "nes", "accept": "op"},
        "nes has no acceptance rule, so accept='op' would have no effect",
    ),
    "threshold of a rule without": ({"threshold": 2.0}, "square does not take these hyper-parameters: threshold"),
    "threshold": ({"accept": "bi", "threshold": 0.0}, "expected threshold > 0 and finite"),
    "preset": ({"preset": "cifar"}, "unknown preset 'cifar': expected one of .*did you mean 'cifar10'"),
    "loss": ({"loss": "hinge"}, "unknown loss 'hinge'"),
    "eps": ({"eps": -1.0}, "expected eps > 0"),
    "budget": ({"budget": 0}, "expected a budget of at least 1"),
    "images": ({"x": images(20) * 255}, r"expected images in \[0, 1\]"),
    "labels": ({"y": torch.zeros(3, dtype=torch.int64)}, "expected labels"),
    "targets": ({"targets": torch.zeros(20)}, "expected targets"),
}


@pytest.mark.parametrize(("changed", "message"), BAD.values(), ids=BAD)
def test_bad_input_raises_before_the_model_is_asked(attacked, changed, message):
    model, x, labels, _ = attacked
    watched = Watch(model)
    with pytest.raises(ValueError, match=message):
        qf.attack(watched, **{"x": x, "y": labels, "budget": 5, **changed})
    assert watched.batches == []


OTHER_TYPES = {
    "fractional seed": {"seed": 1.5},
    "text as seed": {"seed": "a"},
    "seed beyond 64 bits": {"seed": 2**64},
    "text as eps": {"eps": "8/255"},
    "complex labels": {"y": torch.zeros(20, dtype=torch.complex64)},
    "listed attack": {"attack": ["square"]},
}


@pytest.mark.parametrize("changed", OTHER_TYPES.values(), ids=OTHER_TYPES)
def test_input_of_another_type_raises_a_value_error_before_the_model_is_asked(attacked, changed):
    model, x, labels, _ = attacked
    watched = Watch(model)
    with pytest.raises(ValueError, match=r"expected"):
        qf.attack(watched, **{"x": x, "y": labels, "budget": 5, **changed})
    assert watched.batches == []


def test_images_that_want_gradients_leave_no_graph_behind(attacked):
    model, x, labels, _ = attacked
    result = qf.attack(model, x.clone().requires_grad_(), labels, budget=3)
    assert not result.adversarial.requires_grad


def test_progress_counts_spent_and_settled_queries(attacked):
    model, x, labels, result = attacked
    seen = []
    run(Square(), model, Task.create(x, labels, seed=3), 40, progress=lambda *counts: seen.append(counts))
    spent, settled = zip(*seen, strict=True)
    assert list(spent) == sorted(set(spent))
    assert list(settled) == sorted(settled)
    assert seen[-1] == (int(result.queries.sum()), 20 * 40)


def test_confirm_asks_again_about_successes_only(attacked):
    model, x, labels, result = attacked
    task = Task.create(x, labels, seed=3)
    shares = confirm(model, task, result, repeats=3)
    won = (result.fooled_at > 1) & (result.fooled_at < NEVER)
    assert bool((shares[won] == 1).all())
    assert bool(shares[~won].isnan().all())


def test_confirm_finds_that_luck_against_a_noisy_model_does_not_last():
    model, x = Linear(), images(20)
    noisy, task = qf.InputNoise(model, std=0.05), Task.create(x, labels_of(model, x))
    result = run(Square(), noisy, task, 20)
    shares = confirm(noisy, task, result, repeats=10)
    shares = shares[~shares.isnan()]
    assert len(shares) > 3
    assert bool(((shares > 0) & (shares < 1)).any())  # fresh noise for each repeat


# checks and files


def test_lookup_gives_the_entry_or_an_error_that_helps():
    registry = {"square": 1, "simba": 2}
    assert checks.lookup(registry, "simba", "attack") == 2
    with pytest.raises(
        ValueError, match=r"unknown attack 'squre': expected one of simba, square; did you mean 'square'"
    ):
        checks.lookup(registry, "squre", "attack")
    with pytest.raises(ValueError, match=r"unknown attack 'zzz': expected one of simba, square$"):
        checks.lookup(registry, "zzz", "attack")
    with pytest.raises(ValueError, match=r"unknown attack None: expected one of simba, square"):
        checks.lookup(registry, None, "attack")


def test_replacing_puts_the_new_file_in_place_of_the_old(tmp_path):
    path = tmp_path / "new" / "file.txt"
    files.write_text(path, "old")
    with files.replacing(path) as temporary:
        assert temporary.parent == path.parent
        temporary.write_text("new")
        assert path.read_text() == "old"  # until the block ends
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


def test_an_exception_while_replacing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    files.write_text(path, "old")

    def spoil():
        with files.replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError("no space left")

    with pytest.raises(OSError, match=r"no space left"):
        spoil()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_written_as_utf_8(tmp_path):
    files.write_text(tmp_path / "file.txt", "τ = 6")
    assert (tmp_path / "file.txt").read_bytes() == "τ = 6".encode()


@pytest.mark.parametrize(("preset", "name"), [(preset, name) for preset in PRESETS for name in PRESETS[preset]])
def test_a_preset_sets_what_it_says(preset, name):
    for norm, hyper in PRESETS[preset][name].items():
        attack = build(name, norm=norm, preset=preset)
        assert norm in attack.norms
        for key, value in hyper.items():
            assert getattr(attack, key) == value
    assert set(PRESETS[preset]) <= set(qf.ATTACKS)


def test_a_preset_that_says_nothing_of_an_attack_or_norm_raises():
    with pytest.raises(ValueError, match="the preset cifar10 has nothing for signhunter in linf; it has square"):
        build("signhunter", preset="cifar10")
    with pytest.raises(ValueError, match="nothing for rambo in linf"):
        build("rambo", preset="imagenet")
    assert build("nes", norm="l2", preset="imagenet").lr == 2.0


@pytest.mark.parametrize("accept", ["op", "bi"])
def test_a_threshold_that_a_loss_never_reaches_raises_before_the_model_is_asked(accept):
    watch = Watch(Linear())
    x = images(4)
    for attack, loss in (("simba", None), ("square", "probability_margin"), ("signhunter", "probability")):
        with pytest.raises(ValueError, match=r"expected a threshold below .* but got 3; take loss='margin'"):
            qf.attack(watch, x, labels_of(watch.model, x), attack, eps=16 / 255, loss=loss, accept=accept)
    assert watch.batches == []
    qf.attack(watch, x, labels_of(watch.model, x), "simba", eps=16 / 255, budget=9, accept=accept, threshold=0.1)


@pytest.mark.parametrize(
    ("attack", "hyper"),
    [
        ("nes", {"pairs": 2.5}),
        ("nes", {"pairs": True}),
        ("bandits", {"tile": 2.5}),
        ("querynet", {"steps": 2.5}),
        ("querynet", {"batch": 2.5}),
        ("querynet", {"width": 8.0}),
        ("simba", {"frequencies": 2.5}),
        ("hopskipjump", {"probes": 2.5}),
        ("square", {"p_init": True}),
        ("square", {"horizon": 99.5}),
    ],
)
def test_numbers_that_are_not_whole_raise_before_the_model_is_asked(attack, hyper):
    watch = Watch(Linear())
    with pytest.raises(ValueError, match=rf"expected {next(iter(hyper))} .*but got {next(iter(hyper.values()))}"):
        qf.attack(watch, images(4), torch.zeros(4).long(), attack, eps=16 / 255, **hyper)
    assert watch.batches == []


def test_an_l_inf_radius_in_bytes_raises():
    with pytest.raises(ValueError, match=r"expected eps <= 1 for L-inf.* but got 8; is it 8/255"):
        qf.attack(Linear(), images(2), torch.zeros(2).long(), eps=8)
