"""BentoML: the method `predict` takes images (N, 1, 28, 28) in [0, 1]; answers with labels and probabilities."""

import os
from typing import Any

import bentoml
import numpy as np
import torch
from numpy.typing import NDArray

import queryfoil as qf


@bentoml.service
class Classifier:
    """A protected network."""

    def __init__(self) -> None:
        network = qf.models.load("fashion-resnet")  # yours
        self.network = qf.protect(network, qf.load_fit(os.environ.get("FIT", "fit.json")))  # the protection

    @bentoml.api
    def predict(self, images: NDArray[np.float32]) -> dict[str, Any]:
        """Labels (N,) and probabilities (N, K), as the protected network shows them."""
        with torch.inference_mode():
            probs = self.network(torch.from_numpy(images.astype(np.float32))).softmax(1)
        return {"labels": probs.argmax(1).tolist(), "probabilities": probs.tolist()}
