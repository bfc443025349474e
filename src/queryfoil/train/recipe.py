"""What a training recipe may say, and where the shipped ones are."""

import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from queryfoil.checks import lookup

SHIPPED = Path(__file__).parent.parent / "shipped" / "recipes"


class Recipe(BaseModel):
    """Hyper-parameters of one training run; `name` is an entry of `MODELS`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    dataset: str
    seed: int = Field(ge=0)
    epochs: int = Field(ge=1)
    batch: int = Field(ge=2)
    lr: float = Field(gt=0)
    momentum: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0)
    shift: int = Field(ge=0)
    flip: bool


def read(name_or_path: str) -> Recipe:
    """Read a recipe: a path to a TOML file, or the name of a shipped one.

    >>> read("fashion-resnet").dataset
    'fashion-mnist'
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = lookup({p.stem: p for p in SHIPPED.glob("*.toml")}, name_or_path, "recipe")
    try:
        return Recipe.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (ValidationError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"the recipe {path} is not valid: {error}") from None
