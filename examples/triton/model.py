"""Triton's Python backend: tensor `images` (N, 1, 28, 28) in [0, 1] to `probabilities` (N, K)."""

import os
from typing import Any

import torch
import triton_python_backend_utils as pb_utils
from torch.utils.dlpack import from_dlpack, to_dlpack

import queryfoil as qf


class TritonPythonModel:
    """A protected network."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the network, and protect it."""
        network = qf.models.load("fashion-resnet")  # yours
        fit = os.environ.get("FIT", os.path.join(args["model_repository"], args["model_version"], "fit.json"))
        self.network = qf.protect(network, qf.load_fit(fit))  # the protection

    def execute(self, requests: list[Any]) -> list[Any]:
        """Probabilities as the protected network shows them, for each request."""
        responses = []
        for request in requests:
            images = from_dlpack(pb_utils.get_input_tensor_by_name(request, "images").to_dlpack())
            with torch.inference_mode():
                probs = self.network(images).softmax(1)
            responses.append(
                pb_utils.InferenceResponse([pb_utils.Tensor.from_dlpack("probabilities", to_dlpack(probs))])
            )
        return responses
