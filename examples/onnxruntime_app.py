"""onnxruntime: an ONNX network as it is, protected behind it: `python onnxruntime_app.py NETWORK.onnx`."""

import os
import sys
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

import queryfoil as qf


class Protected:
    """An ONNX network (images to logits) whose shown logits are protected."""

    def __init__(self, path: str) -> None:
        self.session = onnxruntime.InferenceSession(path)  # yours
        found = qf.load_fit(os.environ.get("FIT", "fit.json"))
        self.protection = qf.protect(torch.nn.Identity(), found)  # the protection: logits in, logits out

    def __call__(self, images: NDArray[np.float32]) -> NDArray[Any]:
        """Shown logits (N, K)."""
        (logits,) = self.session.run(None, {self.session.get_inputs()[0].name: images})
        with torch.inference_mode():
            shown: NDArray[Any] = self.protection(torch.from_numpy(logits)).numpy()
        return shown


if __name__ == "__main__":
    protected = Protected(sys.argv[1])
    images = qf.data.load("fashion-mnist", "attack")[:8]
    shown = protected(images.images.numpy())
    print("labels", images.labels.tolist(), "answers", shown.argmax(1).tolist())
