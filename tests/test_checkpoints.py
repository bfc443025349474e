"""Weights of others: every published format, written here from its description, and files that are none."""

import os
import pickle
import warnings
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from queryfoil.models import checkpoints, inert
from queryfoil.models.checkpoints import PUBLISHED
from queryfoil.oracle import answers

STATISTICS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def norm(name, n):
    """A batch norm in torch's names."""
    return {f"{name}.{part}": () if part == "num_batches_tracked" else (n,) for part in STATISTICS}


def trades(depth, widen, activation=False):
    """WRN with the names of TRADES."""
    shapes = {"conv1.weight": (16, 3, 3, 3)}
    widths = [16, 16 * widen, 32 * widen, 64 * widen]
    for g in (1, 2, 3):
        for j in range((depth - 4) // 6):
            block, inputs = f"block{g}.layer.{j}", widths[g - 1 if j == 0 else g]
            shapes |= norm(f"{block}.bn1", inputs) | norm(f"{block}.bn2", widths[g])
            shapes |= {f"{block}.conv1.weight": (widths[g], inputs, 3, 3)}
            shapes |= {f"{block}.conv2.weight": (widths[g], widths[g], 3, 3)}
            shapes |= {f"{block}.convShortcut.weight": (widths[g], inputs, 1, 1)} if j == 0 else {}
            shapes |= {f"{block}.activation.{p}": (1,) for p in ("alpha", "beta")} if activation else {}
    shapes |= {f"activation.{p}": (1,) for p in ("alpha", "beta")} if activation else {}
    return shapes | norm("bn1", widths[3]) | {"fc.weight": (10, widths[3]), "fc.bias": (10,)}


def deepmind_wide():
    shapes, widths = {"init_conv.weight": (16, 3, 3, 3)}, [16, 160, 320, 640]
    for g in range(3):
        for j in range(5):
            block, inputs = f"layer.{g}.block.{j}", widths[g if j == 0 else g + 1]
            shapes |= norm(f"{block}.batchnorm_0", inputs) | norm(f"{block}.batchnorm_1", widths[g + 1])
            shapes |= {f"{block}.conv_0.weight": (widths[g + 1], inputs, 3, 3)}
            shapes |= {f"{block}.conv_1.weight": (widths[g + 1], widths[g + 1], 3, 3)}
            shapes |= {f"{block}.shortcut.weight": (widths[g + 1], inputs, 1, 1)} if j == 0 else {}
    shapes |= norm("batchnorm", 640) | {"logits.weight": (10, 640), "logits.bias": (10,)}
    return shapes | {"mean": (3, 1, 1), "std": (3, 1, 1)}


def deepmind_18():
    shapes, widths = {"conv_2d.weight": (64, 3, 3, 3)}, [64, 64, 128, 256, 512]
    for g in range(4):
        for j in range(2):
            block, inputs, outputs = f"layer_{g}.{j}", widths[g if j == 0 else g + 1], widths[g + 1]
            shapes |= norm(f"{block}.batchnorm_0", inputs) | norm(f"{block}.batchnorm_1", outputs)
            shapes |= {f"{block}.conv_2d_1.weight": (outputs, inputs, 3, 3)}
            shapes |= {f"{block}.conv_2d_2.weight": (outputs, outputs, 3, 3)}
            shapes |= {f"{block}.shortcut.weight": (outputs, inputs, 3, 3)} if j == 0 and g > 0 else {}
    return shapes | norm("batchnorm", 512) | {"logits.weight": (10, 512), "logits.bias": (10,)}


def torchvision(layers, inner, groups):
    """Bottlenecks with the names of torchvision; `inner` channels in the first stage's middle convolution."""
    shapes, inputs = {"conv1.weight": (64, 3, 7, 7)} | norm("bn1", 64), 64
    for g, count in enumerate(layers):
        middle, outputs = inner << g, 256 << g
        for j in range(count):
            block = f"layer{g + 1}.{j}"
            shapes |= {f"{block}.conv1.weight": (middle, inputs, 1, 1)} | norm(f"{block}.bn1", middle)
            shapes |= {f"{block}.conv2.weight": (middle, middle // groups, 3, 3)} | norm(f"{block}.bn2", middle)
            shapes |= {f"{block}.conv3.weight": (outputs, middle, 1, 1)} | norm(f"{block}.bn3", outputs)
            if j == 0:
                shapes |= {f"{block}.downsample.0.weight": (outputs, inputs, 1, 1)}
                shapes |= norm(f"{block}.downsample.1", outputs)
            inputs = outputs
    return shapes | {"fc.weight": (1000, inputs), "fc.bias": (1000,)}


def tensorpack():
    """FD's variables."""

    def conv(name, kernel, inputs, outputs):
        parts = {f"{name}/bn/{p}": (outputs,) for p in ("gamma", "beta", "mean/EMA", "variance/EMA")}
        return {f"{name}/W": (kernel, kernel, inputs, outputs)} | parts

    shapes, inputs = conv("conv0", 7, 3, 64), 64
    for g, count in enumerate((3, 4, 23, 3)):
        middle, outputs = 256 << g, 256 << g
        for b in range(count):
            block = f"group{g}/block{b}"
            shapes |= conv(f"{block}/conv1", 1, inputs, middle) | conv(f"{block}/conv2", 3, middle // 32, middle)
            shapes |= conv(f"{block}/conv3", 1, middle, outputs)
            shapes |= conv(f"{block}/convshortcut", 1, inputs, outputs) if b == 0 else {}
            shapes |= conv(f"{block}/non_local/conv", 1, outputs, outputs)
            inputs = outputs
    return shapes | {"linear/W": (2048, 1000), "linear/b": (1000,)}


def resnet_20(stem, stem_bn, stage, convs, bns, last, shortcut=None, noise=False):
    def conv(name, shape):
        alpha = {f"{name}.alpha_w": (shape[0], *[1] * (len(shape) - 1))} if noise else {}
        return {f"{name}.weight": shape} | alpha

    shapes, inputs = conv(stem, (16, 3, 3, 3)) | norm(stem_bn, 16), 16
    for g, width in enumerate((16, 32, 64)):
        for j in range(3):
            block = f"{stage}{g + 1}.{j}"
            for name, bn, entering in zip(convs, bns, (inputs, width), strict=True):
                shapes |= conv(f"{block}.{name}", (width, entering, 3, 3)) | norm(f"{block}.{bn}", width)
            if shortcut and j == 0 and g > 0:
                shapes |= {f"{block}.{shortcut}.0.weight": (width, inputs, 1, 1)} | norm(f"{block}.{shortcut}.1", width)
            inputs = width
    return shapes | conv(last, (10, 64)) | {f"{last}.bias": (10,)}


def behind(prefix, shapes):
    return {prefix + key: shape for key, shape in shapes.items()}


PNI_FILE = {"0.mean": (3,), "0.std": (3,)} | behind(
    "1.",
    resnet_20("conv_1_3x3", "bn_1", "stage_", ("conv_a", "conv_b"), ("bn_a", "bn_b"), "classifier", noise=True),
)
TRS_FILE = behind(
    "module.1.", resnet_20("conv1", "bn1", "layer", ("conv1", "conv2"), ("bn1", "bn2"), "fc", "downsample")
)
WRN_50 = torchvision((3, 4, 6, 3), 128, 1)
ROBUSTNESS_FILE = behind("module.model.", WRN_50) | behind("module.attacker.model.", WRN_50)
ROBUSTNESS_FILE |= {
    f"module.{m}.new_{c}": (3, 1, 1) for m in ("normalizer", "attacker.normalize") for c in ("mean", "std")
}

FILES = {  # name to what its file holds: by which name, and which shapes
    "Standard": ("state_dict", behind("module.", trades(28, 10))),
    "Dai2021Parameterizing": ("state_dict", behind("module.", trades(28, 10, activation=True))),
    "Rade2021Helper_extra": ("state_dict", behind("module.", deepmind_wide())),
    "Rade2021Helper_R18_ddpm": (None, deepmind_18()),
    "Salman2020Do_50_2": (None, behind("module.model.", WRN_50)),
    "wide_resnet50_2_linf": ("model", ROBUSTNESS_FILE),
    "wide_resnet50_2": (None, WRN_50),
    "resnext101_32x8d": (None, torchvision((3, 4, 23, 3), 256, 32)),
    "PNI-W": ("state_dict", PNI_FILE),
}


class Recorder:
    """A class of somebody else's training, as PNI's file holds one."""

    def __init__(self):
        self.epochs, self.table = 160, np.zeros(3)


def values(shapes, seed=0):
    """Random weights that give finite scores: means 0, variances 1."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes.items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(7)
        elif key.endswith(("running_var", "variance/EMA")):
            state[key] = torch.ones(shape)
        elif key.endswith("non_local/conv/bn/gamma"):
            state[key] = torch.zeros(shape)  # as at the start of its training: it grows with the cube of its input
        else:
            state[key] = torch.randn(shape, generator=generator) * 0.05
    return state


def write(path, name, shapes, old=False):
    state = values(shapes)
    content = state
    if name is not None:
        content = {
            "epoch": 3,
            "arch": "net",
            name: state,
            "optimizer": {"param_groups": [{"lr": 0.1}]},
            "recorder": Recorder(),
        }
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    return state


@pytest.mark.parametrize("name", FILES)
def test_names_and_shapes_are_those_of_the_published_file(name, monkeypatch):
    on_meta = {key: torch.empty(shape, device="meta") for key, shape in FILES[name][1].items()}
    monkeypatch.setattr(checkpoints, "_state", lambda path, *names: on_meta)
    state = PUBLISHED[name].read("nowhere")
    with torch.device("meta"):
        wanted = PUBLISHED[name].build().state_dict()
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in wanted.items()}


def test_names_and_shapes_are_those_of_tensorflows_file():
    state = checkpoints.from_tensorflow({k: torch.empty(shape, device="meta") for k, shape in tensorpack().items()})
    with torch.device("meta"):
        wanted = PUBLISHED["X101-DenoiseAll"].build().state_dict()
    wanted = {key: value.shape for key, value in wanted.items() if not key.endswith("num_batches_tracked")}
    assert {key: value.shape for key, value in state.items()} == wanted


def test_tensorflows_kernels_are_turned():
    kernel = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)  # height, width, in, out
    state = checkpoints.from_tensorflow(
        {"conv0/W": kernel, "linear/W": torch.arange(6.0).view(2, 3), "global_step": torch.tensor(3)}
    )
    assert set(state) == {"conv1.weight", "fc.weight"}
    assert state["conv1.weight"][4, 2, 1, 0] == kernel[1, 0, 2, 4]
    assert torch.equal(state["fc.weight"], torch.arange(6.0).view(2, 3).T)


@pytest.mark.parametrize("old", [False, True])
def test_noise_on_weights_is_read_from_its_own_file(tmp_path, old):
    raw = write(tmp_path / "model_best.pth.tar", *FILES["PNI-W"], old=old)
    model = checkpoints.load("PNI-W", tmp_path / "model_best.pth.tar")
    assert not any(module.training for module in model.modules())
    layer = model.model.blocks[4].conv2.parametrizations.weight
    assert torch.equal(layer.original, raw["1.stage_2.1.conv_b.weight"])
    assert torch.equal(layer[0].alpha, raw["1.stage_2.1.conv_b.alpha_w"].flatten())
    x, rows = torch.rand(4, 3, 32, 32), torch.arange(4)
    assert bool(answers(model, x, rows, rows + 1).isfinite().all())


def test_an_ensemble_is_read_from_three_files(tmp_path):
    raw = {}
    for i in range(3):
        raw[i] = values(TRS_FILE, seed=i)
        torch.save({"epoch": 1, "state_dict": raw[i]}, tmp_path / f"checkpoint.pth.tar.{i}")
    model = checkpoints.load("TRS", tmp_path / "checkpoint.pth.tar")
    for i in range(3):
        assert torch.equal(
            model.members[i].blocks[6].shortcut[0].weight, raw[i]["module.1.layer3.0.downsample.0.weight"]
        )
    x = torch.rand(4, 3, 32, 32)
    expected = torch.stack([member(x).softmax(1) for member in model.members]).mean(0)
    torch.testing.assert_close(model(x).exp(), expected)
    assert model.output == "log_probs"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PUBLISHED if name not in ("PNI-W", "TRS")])
def test_a_file_of_full_size_answers_four_images(name, tmp_path):
    path = tmp_path / "weights"
    if name == "X101-DenoiseAll":
        state = values(tensorpack())
        np.savez(tmp_path / "weights.npz", **{key: value.numpy() for key, value in state.items()})
        path = tmp_path / "weights.npz"
    else:
        write(path, *FILES[name])
    model = checkpoints.load(name, path)
    size = (
        224
        if model.state_dict()["fc.weight" if "fc.weight" in model.state_dict() else "logits.weight"].shape[0] == 1000
        else 32
    )
    rows = torch.arange(4)
    x = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    scores = answers(model, x, rows, rows)
    assert scores.shape == (4, 1000 if size == 224 else 10)
    assert not torch.equal(scores[0], scores[1])


def small_network():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten())


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_a_file_of_another_network_is_refused_by_name(tmp_path, monkeypatch, change):
    published = checkpoints.Published("", small_network, checkpoints.robustbench, "")
    monkeypatch.setitem(PUBLISHED, "small", published)
    state = small_network().state_dict()
    if change == "missing":
        del state["0.bias"]
        expected = r"1 are missing \(first 0.bias\) and none is unexpected"
    elif change == "unexpected":
        state["head.weight"] = torch.zeros(3)
        expected = r"none is missing and 1 are unexpected \(first head.weight\)"
    else:
        state["0.bias"] = torch.zeros(3)
        expected = r"expected 0.bias \(2,\) in .*, as small has it, but got \(3,\)"
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=expected):
        checkpoints.load("small", tmp_path / "other.pt")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("old", [False, True])
def test_no_file_can_run_code(tmp_path, old):
    torch.save(
        {"state_dict": {"a": torch.ones(2)}, "other": Malicious(tmp_path / "made")},
        tmp_path / "bad.pt",
        _use_new_zipfile_serialization=not old,
    )
    content = inert.read_pickle(tmp_path / "bad.pt")
    assert torch.equal(content["state_dict"]["a"], torch.ones(2))
    assert not (tmp_path / "made").exists()
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Malicious(tmp_path / "made")))
    with pytest.raises(ValueError, match="cannot be read"):
        inert.read_pickle(tmp_path / "plain.pt")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected a file of weights at .* but there is none"),
        (b"no pickle", "cannot be read"),
        ({"weights": 3}, "expected a dictionary of weights in .*, or one with it as state_dict"),
    ],
)
def test_what_is_no_file_of_weights_is_refused(tmp_path, content, message):
    path = tmp_path / "file.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        checkpoints.load("Standard", path)
    with pytest.raises(ValueError, match=r"expected a NumPy file \(.npz\)"):
        checkpoints.load("X101-DenoiseAll", path)


def test_an_unknown_name_is_answered_with_a_near_one():
    with pytest.raises(ValueError, match=r"unknown published network 'Standrd': .*did you mean 'Standard'"):
        checkpoints.load("Standrd", "x")


def test_a_program_is_refused_before_torch_would_run_it(tmp_path):
    class Program(nn.Module):
        def forward(self, x):
            return x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Program()).save(str(tmp_path / "program.pt"))
    with pytest.raises(ValueError, match=r"but it holds a program \(TorchScript\)"):
        inert.read_pickle(tmp_path / "program.pt")
    with pytest.raises(ValueError, match=r"but it holds a program"):
        checkpoints.load("Standard", tmp_path / "program.pt")


def test_a_pickle_can_set_nothing_on_what_it_may_call(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "good.pt")
    evil = b"\x80\x02ctorch._utils\n_rebuild_parameter\nN}X\x04\x00\x00\x00evilX\x03\x00\x00\x00yess\x86b."
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "bad.pt", "w") as bad:
        for name in good.namelist():
            bad.writestr(name, evil if name.endswith("data.pkl") else good.read(name))
    inert.read_pickle(tmp_path / "bad.pt")
    assert not hasattr(torch._utils._rebuild_parameter, "evil")


def test_damaged_files_of_other_kinds_are_said_in_a_sentence(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"no tensors")
    for path in (tmp_path / "a.safetensors", tmp_path / "b.safetensors"):
        with pytest.raises(ValueError, match=r"expected a file of weights"):
            checkpoints.load("Standard", path)
    for number, arrays in enumerate(
        ({"a/W": np.zeros((1, 2, 3))}, {"a/W": np.array(["text"])}, {"a/W": np.array([None])})
    ):
        np.savez(tmp_path / f"{number}.npz", **arrays)
        with pytest.raises(ValueError, match=r"but it holds other things than their arrays"):
            checkpoints.load("X101-DenoiseAll", tmp_path / f"{number}.npz")
