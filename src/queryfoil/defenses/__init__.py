"""Defenses: modules whose first argument is the model they wrap; `DEFENSES` names them."""

from torch import nn

from queryfoil.defenses.aaa import AAA
from queryfoil.defenses.noise import InputNoise

DEFENSES: dict[str, type[nn.Module]] = {
    "aaa": AAA,
    "input_noise": InputNoise,
}


def tau_of(model: object) -> float | None:
    """The period of the outermost AAA in a model, or None where there is none to be seen."""
    layers = model.modules() if isinstance(model, nn.Module) else ()
    return next((layer.tau for layer in layers if isinstance(layer, AAA)), None)
