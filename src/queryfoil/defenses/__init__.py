"""Defenses: modules whose first argument is the model they wrap; `DEFENSES` names them."""

from torch import nn

from queryfoil.defenses.aaa import AAA
from queryfoil.defenses.noise import InputNoise

DEFENSES: dict[str, type[nn.Module]] = {
    "aaa": AAA,
    "input_noise": InputNoise,
}
