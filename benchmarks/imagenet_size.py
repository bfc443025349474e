"""Files of a network of the size of ImageNet's, for `benchmarks/serve.py`: WRN-50-2, 224 x 224, 1,000 classes.

Its weights are random, as time does not depend on them; so are the logits that the protections are fitted to.

python benchmarks/imagenet_size.py FOLDER      # writes plain.onnx, terraces.onnx and aaa.onnx
python benchmarks/serve.py FOLDER/terraces.onnx FOLDER/plain.onnx --clients 1 --requests 10 --rounds 30
"""

import argparse
from pathlib import Path

import torch

import queryfoil as qf
from queryfoil.deploy.export import export
from queryfoil.models.checkpoints import PUBLISHED
from queryfoil.models.victim import Victim

SHAPE, CLASSES = (3, 224, 224), 1000


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    network = PUBLISHED["wide_resnet50_2"].build().eval()
    logits = 4 * torch.randn(5000, CLASSES)
    labels = torch.multinomial(logits.softmax(1), 1).squeeze(1)
    fits = {
        "plain": lambda: None,
        "terraces": lambda: qf.fit(logits, labels, allowed=0.1),
        "aaa": lambda: qf.fit(logits, labels, objective="greedy"),
    }
    for name, fit in fits.items():
        print(export(Victim(network), fit(), folder / f"{name}.onnx", shape=SHAPE), flush=True)


if __name__ == "__main__":
    main()
