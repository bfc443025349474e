"""LitServe: POST /predict {"image": (1, 28, 28) in [0, 1]}; answers with a label and probabilities."""

import os
from typing import Any

import litserve as ls
import torch
from torch import Tensor

import queryfoil as qf


class Classifier(ls.LitAPI):  # type: ignore[misc]
    """A protected network; requests are batched by LitServe, which changes no answer."""

    def setup(self, device: str) -> None:
        """Load the network, and protect it."""
        network = qf.models.load("fashion-resnet")  # yours
        network = qf.protect(network, qf.load_fit(os.environ.get("FIT", "fit.json")))  # the protection
        self.device, self.network = device, network.to(device)

    def decode_request(self, request: dict[str, Any]) -> Tensor:
        """The image that a client sent."""
        return torch.tensor(request["image"], device=self.device)

    def batch(self, inputs: list[Tensor]) -> Tensor:
        """Images (N, 1, 28, 28)."""
        return torch.stack(inputs)

    def predict(self, x: Tensor) -> Tensor:
        """Probabilities (N, K), as the protected network shows them."""
        with torch.inference_mode():
            probs: Tensor = self.network(x).softmax(1)
        return probs

    def unbatch(self, output: Tensor) -> list[Tensor]:
        """Those of each image."""
        return list(output)

    def encode_response(self, output: Tensor) -> dict[str, Any]:
        """What a client gets."""
        return {"label": int(output.argmax()), "probabilities": output.tolist()}


if __name__ == "__main__":
    ls.LitServer(Classifier(max_batch_size=64, batch_timeout=0.005)).run(port=8000, host="127.0.0.1")
