"""The networks that ship with the library."""

from queryfoil.models.zoo import MODELS as MODELS
from queryfoil.models.zoo import load as load
