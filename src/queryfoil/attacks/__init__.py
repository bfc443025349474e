"""Query attacks, one a file; `ATTACKS` names them."""

import tomllib
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from queryfoil.attacks.acceptance import ACCEPTANCE, Rule
from queryfoil.attacks.adaptive import Adaptive
from queryfoil.attacks.bandits import Bandits
from queryfoil.attacks.blind_square import BlindSquare
from queryfoil.attacks.border_walk import BorderWalk
from queryfoil.attacks.cgba import CGBA
from queryfoil.attacks.hopskipjump import HopSkipJump
from queryfoil.attacks.label_reading import LabelAlone
from queryfoil.attacks.leak import Leak
from queryfoil.attacks.nes import NES
from queryfoil.attacks.op_share import OppositeShare
from queryfoil.attacks.querynet import QueryNet
from queryfoil.attacks.rambo import RamBo
from queryfoil.attacks.rays import RayS
from queryfoil.attacks.readings import READINGS as STATELESS
from queryfoil.attacks.readings import Reading
from queryfoil.attacks.sign_opt import SignOPT
from queryfoil.attacks.signhunter import SignHunter
from queryfoil.attacks.simba import SimBA
from queryfoil.attacks.sine import InvertSine, Tracked
from queryfoil.attacks.square import Square
from queryfoil.attacks.surfree import SurFree
from queryfoil.attacks.tactics import TACTICS as WALKS
from queryfoil.attacks.tactics import Tactic
from queryfoil.checks import lookup, require_positive, require_whole
from queryfoil.run import Attack

ATTACKS: dict[str, type[Attack[Any]]] = {
    "square": Square,
    "signhunter": SignHunter,
    "simba": SimBA,
    "nes": NES,
    "bandits": Bandits,
    "querynet": QueryNet,
    "hopskipjump": HopSkipJump,
    "rambo": RamBo,
    "rays": RayS,
    "signopt": SignOPT,
    "surfree": SurFree,
    "cgba": CGBA,
    "blind_square": BlindSquare,
    "border_walk": BorderWalk,
}

TACTICS: dict[str, type[Tactic]] = {**WALKS, OppositeShare.name: OppositeShare}
"""Acceptance rules of attackers who expect a defense."""

RULES: dict[str, type[Rule] | type[Tactic]] = {**ACCEPTANCE, **TACTICS}
"""The paper's acceptance rules, and those of attackers who expect a defense."""

READINGS: dict[str, type[Reading]] = {
    **STATELESS,
    InvertSine.name: InvertSine,
    Leak.name: Leak,
    LabelAlone.name: LabelAlone,
}
"""What an attacker who expects a defense makes of the scores."""

SAME_IMAGE = 1e-9
"""A radius of neighbours that rounding to 8 bits takes away: they are the image itself, asked about again."""

PRESETS: dict[str, dict[str, dict[str, dict[str, Any]]]] = tomllib.loads(
    (Path(__file__).parent.parent / "shipped" / "presets.toml").read_text(encoding="utf-8")
)
"""Name to hyper-parameters of each attack in each norm: the paper's, table 11, and the originals' for L2."""


def build(
    name: str,
    accept: str = "greedy",
    *,
    norm: str = "linf",
    tau: float | None = None,
    preset: str | None = None,
    **hyper: Any,
) -> Attack[Any]:
    """An attack by its name, with its hyper-parameters; ValueError for what it does not take.

    `accept` names an acceptance rule, whose own parameters are among `hyper`; only attacks that have one
    take it. `norm` decides the defaults of some. `tau` is the defense's, where it is known: half of it is
    the threshold of `op` and `bi`, and readings take it. `preset` ("cifar10" or "imagenet") sets the paper's
    hyper-parameters, which `hyper` overrides. `hyper` may also have a `reading` of `READINGS` with its parameters, and
    `neighbours` with their `radius` (see `adaptive`), or `repeats`: how many answers to the same image are averaged,
    each of them a query, against defenses that draw anew.

    >>> build("square", "bi", tau=4.0, p_init=0.1)
    Square(p_init=0.1, horizon=10000, accept=Bidirectional(threshold=2.0))
    >>> build("square", "reverse", patience=5, reading="invert_linear", tau=4.0).reading
    InvertLinear(tau=4.0, alpha=1.0)
    """
    kind: Any = lookup(ATTACKS, name, "attack")
    known = [field.name for field in fields(kind)]
    usual = dict(kind.l2) if norm == "l2" else {}
    if preset is not None:
        usual |= _preset(preset, name, norm)
    hyper = usual | hyper
    rule: Any = lookup(RULES, accept, "acceptance rule")
    reading: Any = None if "reading" not in hyper else lookup(READINGS, hyper.pop("reading"), "reading")
    adapted: dict[str, Any] = {key: hyper.pop(key) for key in ("neighbours", "radius") if key in hyper}
    if "repeats" in hyper:
        if adapted:
            raise ValueError("repeats and neighbours average in two ways; choose one of them")
        require_whole("repeats", hyper["repeats"], 2)
        adapted = {"neighbours": hyper.pop("repeats"), "radius": SAME_IMAGE}
    if reading is not None:
        adapted["reading"] = _part(reading, hyper, {} if tau is None else {"tau": tau})
        known += [field.name for field in fields(reading)]
    extra: dict[str, Any] = {}
    if "accept" in known:
        known.remove("accept")
        part = _part(rule, hyper, {} if tau is None else {"threshold": tau / 2})
        known += [field.name for field in fields(rule)]
        if accept in TACTICS:
            adapted["tactic"] = part
        else:
            extra = {"accept": part}
    elif accept != "greedy":
        raise ValueError(f"{name} has no acceptance rule, so accept={accept!r} would have no effect; leave it out")
    if kind.loss is not None and kind.rowwise:
        known += ["reading", "neighbours", "radius", "repeats"]
    for given in hyper:
        if given not in known:
            raise ValueError(f"{name} does not take these hyper-parameters: {given}; it takes {', '.join(known)}")
    attack: Attack[Any] = kind(**hyper, **extra)
    followed = adapted.pop("reading") if reading is InvertSine else None
    attack = Adaptive(attack, **adapted) if adapted else attack
    return attack if followed is None else Tracked(attack, followed)


def build_stated(name: str, accept: str, *, norm: str, tau: float | None, hyper: dict[str, Any]) -> Attack[Any]:
    """`build`, where a `tau` among `hyper` is what the attacker takes the defense's for, whatever it is.

    `tau` is the defense's, for who states none. ValueError where no part of the attack takes the stated one.

    >>> build_stated("square", "op", norm="linf", tau=6.0, hyper={"tau": 4.0}).accept
    Opposite(threshold=2.0)
    """
    rest = {key: value for key, value in hyper.items() if key != "tau"}
    stated = hyper.get("tau")
    if stated is None:
        return build(name, accept, norm=norm, tau=tau, **rest)
    require_positive("tau", stated)
    found, other = (build(name, accept, norm=norm, tau=value, **rest) for value in (stated, 2 * stated))
    if found == other:
        raise ValueError(f"no part of this attack takes tau, so tau={stated!r} would have no effect; leave it out")
    return found


def _part(kind: Any, hyper: dict[str, Any], usual: dict[str, Any]) -> Any:
    """A rule or reading with its own hyper-parameters, which are taken out of `hyper`; `usual` has defaults."""
    names = [field.name for field in fields(kind)]
    own = {name: hyper.pop(name) for name in names if name in hyper}
    return kind(**{name: value for name, value in usual.items() if name in names} | own)


def _preset(preset: str, name: str, norm: str) -> dict[str, Any]:
    """What a preset says of an attack in a norm; ValueError where it says nothing."""
    found = lookup(PRESETS, preset, "preset")
    if norm not in found.get(name, {}):
        has = ", ".join(f"{attack} ({', '.join(norms)})" for attack, norms in found.items())
        raise ValueError(f"the preset {preset} has nothing for {name} in {norm}; it has {has}")
    return found[name][norm]


def settings(attack: Attack[Any]) -> dict[str, Any]:
    """All hyper-parameters of an attack by name, those of its acceptance rule among them.

    >>> settings(build("square"))
    {'p_init': 0.05, 'horizon': 10000, 'accept': 'greedy'}
    """
    if isinstance(attack, Tracked):
        return settings(attack.attack) | {"reading": attack.reading.name, **vars(attack.reading)}
    if isinstance(attack, Adaptive):
        found = settings(attack.attack)
        if attack.tactic is not None:
            found |= {"accept": attack.tactic.name, **vars(attack.tactic)}
        if attack.reading is not None:
            found |= {"reading": attack.reading.name, **vars(attack.reading)}
        if attack.radius == SAME_IMAGE:
            return found | {"repeats": attack.neighbours}
        around = {"neighbours": attack.neighbours, "radius": attack.radius}
        return found | (around if attack.neighbours > 1 else {})
    values = asdict(attack)  # type: ignore[call-overload]
    rule: Rule | None = getattr(attack, "accept", None)
    return values if rule is None else {**values, "accept": rule.name, **values["accept"]}


def modules(attack: Attack[Any]) -> set[str]:
    """The modules of an attack and its parts; with all that they import, the code that runs it."""
    if isinstance(attack, Tracked):
        return modules(attack.attack) | {type(attack).__module__}
    parts: list[Any] = [attack]
    if isinstance(attack, Adaptive):
        parts += [part for part in (attack.attack, attack.tactic, attack.reading) if part is not None]
    return {type(part).__module__ for part in parts}
