"""Defenses: modules whose first argument is the model they wrap; `DEFENSES` names them."""

from typing import Any

from torch import nn

from queryfoil.defenses.aaa import AAA
from queryfoil.defenses.boundary import BoundaryNoise
from queryfoil.defenses.coarse import HighConfidence, LabelOnly, RoundedScores, TopK
from queryfoil.defenses.dent import DENT
from queryfoil.defenses.dld import DLD
from queryfoil.defenses.noise import InputNoise, OutputNoise
from queryfoil.defenses.pni import PNI
from queryfoil.defenses.preprocess import JPEG, BitDepth, Median, TotalVariation
from queryfoil.defenses.reverse_sigmoid import ReverseSigmoid
from queryfoil.defenses.rfd import RFD
from queryfoil.defenses.rls import RLS
from queryfoil.defenses.temperature import TemperatureScaling
from queryfoil.defenses.terraces import Terraces

DEFENSES: dict[str, Any] = {
    "aaa": AAA,
    "terraces": Terraces,
    "temperature": TemperatureScaling,
    "input_noise": InputNoise,
    "output_noise": OutputNoise,
    "dent": DENT,
    "pni": PNI,
    "bit_depth": BitDepth,
    "jpeg": JPEG,
    "median": Median,
    "total_variation": TotalVariation,
    "dld": DLD,
    "rls": RLS,
    "rfd": RFD,
    "boundary_noise": BoundaryNoise,
    "rounded": RoundedScores,
    "reverse_sigmoid": ReverseSigmoid,
    "top_k": TopK,
    "label_only": LabelOnly,
    "high_confidence": HighConfidence,
}
"""Name to class: the model first, then settings by name."""


def tau_of(model: object) -> float | None:
    """The period of the outermost AAA in a model, or None where there is none to be seen."""
    layers = model.modules() if isinstance(model, nn.Module) else ()
    return next((layer.tau for layer in layers if isinstance(layer, AAA)), None)
