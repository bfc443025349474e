"""A plan: a TOML file that lists the cells of an experiment, checked before anything runs."""

import hashlib
import inspect
import json
import tomllib
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from queryfoil import comparable, grid
from queryfoil.attacks import ATTACKS, RULES, build_stated, settings
from queryfoil.checks import lookup
from queryfoil.data import DATASETS, Images
from queryfoil.defenses import DEFENSES
from queryfoil.deploy.endpoint import Address, is_url
from queryfoil.layout import Layout
from queryfoil.losses import LOSSES
from queryfoil.models.victim import Input, Victim, check_spec, victim
from queryfoil.run import Attack, check
from queryfoil.task import NORMS, Task

SHIPPED = Path(__file__).parent / "shipped" / "plans"
AS_SERVED = "as served"
"""Entry on the axis of defenses of what is audited: nobody knows its undefended network."""


def _number(value: object) -> object:
    """TOML has no fractions: "16/255" is one."""
    if not isinstance(value, str):
        return value
    try:
        return float(Fraction(value))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"expected a number or a fraction such as '16/255', but got {value!r}") from None


Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False, strict=True)]
"""A finite number, or a text with a fraction."""


class Defense(BaseModel):
    """One layer of protection: a name of `DEFENSES`, its arguments, and whether `fit` completes them."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    fit: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _known(self) -> "Defense":
        kind = lookup(DEFENSES, self.name, "defense")
        if self.fit and not hasattr(kind, "fit"):
            fits = ", ".join(name for name, kind in DEFENSES.items() if hasattr(kind, "fit"))
            raise ValueError(f"fit is set for {self.name}, which has nothing to fit; only {fits} can be fitted")
        parameters = inspect.signature(kind.fit if self.fit else kind).parameters.values()
        accepted = dict.fromkeys(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        if self.fit and "temperature" in self.arguments:
            raise ValueError("fit finds the temperature, so setting it as well would have no effect; leave one out")
        for name in self.arguments:
            lookup(accepted, name, f"argument of {self.name}")
        needed = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
        if missing := [name for name in needed if name not in self.arguments]:
            raise ValueError(f"{self.name} needs {', '.join(missing)}, which a fit finds; set fit, or pass a fit")
        return self


def _numbers(value: object) -> object:
    """Of the command line: "0.485,0.456,0.406"; a single number is for all channels."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    return tuple(_number(part) for part in parts)


Numbers = Annotated[tuple[Annotated[float, Field(allow_inf_nan=False, strict=True)], ...], BeforeValidator(_numbers)]


class Settings(BaseModel):
    """What is attacked and how: model and its input and output; attack, norm, eps, goal, loss, budget, seed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str  # as `models.victim.victim` takes it, and the next four with it; or the URL of an audited endpoint
    output: str | None = None
    mean: Numbers | None = None
    std: Numbers | None = None
    size: int | None = Field(default=None, ge=1)
    attack: str
    hyper: dict[str, float | int | str | bool] = {}
    accept: str = "greedy"
    loss: str | None = None  # the attack's own; stays None for one that sees labels alone
    norm: str = "linf"
    eps: Annotated[Number, Field(gt=0)]
    targeted: bool = False
    budget: int = Field(ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        for registry, name, kind in (
            (ATTACKS, self.attack, "attack"),
            (RULES, self.accept, "acceptance rule"),
            (NORMS, self.norm, "norm"),
        ):
            lookup(registry, name, kind)
        if self.loss is not None:
            lookup(LOSSES, self.loss, "loss")
        if taken := sorted({"name", "accept"} & self.hyper.keys()):
            raise ValueError(f"{self.attack} does not take these hyper-parameters: {', '.join(taken)}")
        try:
            built = self.build()
        except TypeError as error:  # a text for a number
            raise ValueError(f"these hyper-parameters do not fit {self.attack}: {error}") from None
        check(built, self.norm, self.targeted, self.loss)
        return self

    @model_validator(mode="after")
    def _model(self) -> Self:
        if is_url(self.model):
            Address.parse(self.model)
        else:
            check_spec(self.model, self.input)
        return self

    @model_validator(mode="before")
    @classmethod
    def _own_loss(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("loss") is None and given.get("attack") in ATTACKS:
            return {**given, "loss": ATTACKS[given["attack"]].loss}
        return given

    def model_settings(self) -> dict[str, Any]:
        """What decides the model."""
        return self.model_dump(include={"model", "output", "mean", "std", "size"})

    def attack_settings(self) -> dict[str, Any]:
        """What decides the attack, but for its hyper-parameters."""
        return self.model_dump(include={"norm", "eps", "targeted", "loss", "budget", "seed"})

    @property
    def input(self) -> Input:
        """What the model wants done to the images before it sees them."""
        return Input(self.mean, self.std, self.size)

    def victim(self, device: str) -> Victim:
        """The model, undefended."""
        if is_url(self.model):
            raise ValueError(
                f"{self.model} is an endpoint, which only `queryfoil audit` asks: it keeps a rate and counts what is "
                "sent; run `queryfoil audit URL`"
            )
        return victim(self.model, device, self.output, self.input)

    def build(self, tau: float | None = None) -> Attack[Any]:
        """The attack, on a defense with this tau; a `tau` in `hyper` is what the attacker takes it for."""
        return build_stated(self.attack, self.accept, norm=self.norm, tau=tau, hyper=self.hyper)

    def task(self, images: Images, targets: Tensor | None) -> Task:
        """The attack's task on these images."""
        return Task.create(
            images.images,
            images.labels,
            images.ids,
            targets,
            self.norm,
            self.eps,
            self.loss or "margin",
            self.seed,
        )


class Cell(Settings):
    """One row of a plan: data, defenses from the inside out, and what `Settings` has."""

    label: Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$")]
    dataset: str
    defenses: tuple[Defense, ...] = ()
    n: int = Field(ge=1)
    place: dict[str, str] = {}  # its entry on each axis of a grid
    trace: int = Field(default=0, ge=0)  # of how many images the losses along the attack are recorded

    @model_validator(mode="after")
    def _registered(self) -> Self:
        lookup(DATASETS, self.dataset, "data set")
        if self.trace and settings(self.build()).get("accept") != "greedy":
            raise ValueError("trace is for attacks with the acceptance rule greedy, the others have no current point")
        if self.trace > self.n:
            raise ValueError(f"expected trace <= n = {self.n}, but got {self.trace}")
        return self

    @property
    def audited(self) -> bool:
        """Whether the model is what a service shows, so that there is no undefended network to compare it with."""
        return self.place.get("defense") == AS_SERVED

    def settings(self) -> dict[str, Any]:
        """All that decides the result; the label does not."""
        return {**self.model_dump(exclude={"label", "defenses", "place", "trace"}), "defenses": self.defense_settings()}

    def defense_settings(self) -> list[dict[str, Any]]:
        """The defenses as the plan says them, from the inside out."""
        return [d.model_dump() for d in self.defenses]


class Plan(BaseModel):
    """Cells, at how many queries accuracy is reported besides the budget, and the paper's table that they repeat.

    `paper` has the paper's own numbers, in percent or queries: for each row of the table, a value for each column, of
    several numbers where `at` has several.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    about: str
    scale: str | None = None
    report_at: tuple[Annotated[int, Field(ge=1)], ...] = (100,)
    cells: tuple[Cell, ...] = Field(min_length=1)
    layout: Layout | None = None
    paper: dict[str, dict[str, str]] = {}

    @model_validator(mode="after")
    def _distinct(self) -> "Plan":
        labels = [cell.label for cell in self.cells]
        if len(set(labels)) < len(labels):
            raise ValueError("expected a different label for each cell, but some repeat")
        return self

    @model_validator(mode="after")
    def _laid_out(self) -> "Plan":
        if self.layout is not None:
            self.layout.check([cell.place for cell in self.cells], min(cell.budget for cell in self.cells), self.paper)
            comparable.check(self.layout, self.cells)
        elif self.paper:
            raise ValueError("the paper's numbers are shown by a layout; add [layout], or leave [paper] out")
        return self

    def digest(self) -> str:
        """Names the plan by its content; how it is shown does not count."""
        return digest(self.model_dump(exclude={"layout", "paper", "about"}))


def digest(value: object) -> str:
    """16 hexadecimal digits of the SHA-256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def shipped() -> dict[str, Path]:
    """Name to path of the plans that come with the library."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.toml"))}


def read(name_or_path: str | Path, scale: str | None = None, checkpoints: str | Path = grid.CHECKPOINTS) -> Plan:
    """Read a plan: a path to a TOML file, or the name of a shipped one.

    The file has `name`, `about`, `report_at`, a table `defaults`, and an array `cell` of tables that
    override the defaults, or an array `grid` (see `grid.expand`). `scale` and the folder `checkpoints` are for plans
    that have scales. ValueError names every field that is wrong.

    >>> read("quick").cells[0].label
    'undefended'
    """
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = lookup(shipped(), str(name_or_path), "plan")
    elif not path.is_file():
        raise FileNotFoundError(f"expected a plan at {path}, but there is no such file")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    try:
        return Plan.model_validate(grid.expand(content, scale, checkpoints))
    except ValidationError as error:
        raise ValueError(f"the plan {path} is not valid:\n" + reasons(error, "plan")) from None
    except ValueError as error:
        raise ValueError(f"the plan {path} is not valid: {error}") from None


def reasons(error: ValidationError, whole: str) -> str:
    """A line for each field that is wrong; `whole` names what has no field of its own."""
    return "\n".join(
        f"  {'.'.join(map(str, e['loc'])) or whole}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()
    )
