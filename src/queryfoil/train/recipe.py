"""What a training recipe may say, and where the shipped ones are."""

import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from queryfoil.checks import lookup
from queryfoil.plan import reasons
from queryfoil.train.objectives import AnyObjective, Standard

SHIPPED = Path(__file__).parent.parent / "shipped" / "recipes"


class Recipe(BaseModel):
    """Hyper-parameters of one training run; `name` is an entry of `MODELS`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    about: str
    dataset: str
    seed: int = Field(ge=0)
    epochs: int = Field(ge=1)
    batch: int = Field(ge=2)
    lr: float = Field(gt=0, allow_inf_nan=False)
    momentum: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0, allow_inf_nan=False)
    shift: int = Field(ge=0)
    flip: bool
    objective: AnyObjective = Standard()
    notes: tuple[str, ...] = ()  # what was tried and did not work; goes into the card


def read(name_or_path: str) -> Recipe:
    """Read a recipe: a path to a TOML file, or the name of a shipped one.

    >>> read("fashion-resnet").dataset
    'fashion-mnist'
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = lookup({p.stem: p for p in SHIPPED.glob("*.toml")}, name_or_path, "recipe")
    elif not path.is_file():
        raise FileNotFoundError(f"expected a recipe at {path}, but there is no such file")
    try:
        return Recipe.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    except ValidationError as error:
        raise ValueError(f"the recipe {path} is not valid:\n" + reasons(error, "recipe")) from None
