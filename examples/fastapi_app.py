"""FastAPI: POST /predict {"images": (N, 1, 28, 28) in [0, 1]}; answers with labels and probabilities."""

import os

import torch
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel

import queryfoil as qf

network = qf.models.load("fashion-resnet")  # yours
network = qf.protect(network, qf.load_fit(os.environ.get("FIT", "fit.json")))  # the protection

app = FastAPI()


class Images(BaseModel):
    """What a client sends."""

    images: list[list[list[list[float]]]]


@app.post("/predict")
def predict(sent: Images) -> dict[str, list[int] | list[list[float]]]:
    """Labels (N,) and probabilities (N, K), as the protected network shows them."""
    try:
        x = torch.tensor(sent.images)
    except ValueError as error:
        raise HTTPException(422, "expected images of one size") from error
    if x.shape[1:] != (1, 28, 28) or not bool(((x >= 0) & (x <= 1)).all()):
        raise HTTPException(422, f"expected images (N, 1, 28, 28) in [0, 1], but got {tuple(x.shape)}")
    with torch.inference_mode():
        probs = network(x).softmax(1)
    return {"labels": probs.argmax(1).tolist(), "probabilities": probs.tolist()}
