"""The file that is served: a graph whose only output is what is shown, and what it says of itself."""

import json
import math
from pathlib import Path
from typing import Literal

import onnxruntime
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

INPUT, OUTPUT = "images", "scores"
KEY = "queryfoil"  # of the file's metadata


class Margins(BaseModel):
    """Quantiles of the margins that were shown for the held-out images: shares in [0, 1] and margins, both rising."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    quantiles: tuple[float, ...] = Field(min_length=2)
    margins: tuple[float, ...]

    @model_validator(mode="after")
    def _rising(self) -> "Margins":
        if len(self.quantiles) != len(self.margins):
            raise ValueError("expected as many margins as quantiles")
        if any(list(row) != sorted(row) for row in (self.quantiles, self.margins)):
            raise ValueError("expected quantiles and margins in rising order")
        if not 0 <= self.quantiles[0] <= self.quantiles[-1] <= 1:
            raise ValueError("expected quantiles in [0, 1]")
        return self


class About(BaseModel):
    """What a server has to know of a protected model, and no more: a defense's name, but none of its parameters."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: str
    defense: str | None
    input: Literal["images", "scores"]
    input_shape: tuple[int, ...]
    classes: int = Field(ge=2)
    output: Literal["logits", "log_probs", "probs"]
    shown_margins: Margins | None = None

    @property
    def values(self) -> int:
        """Numbers an image has."""
        return math.prod(self.input_shape)


def session(path: Path, threads: int = 1) -> onnxruntime.InferenceSession:
    """An onnxruntime session of a file, on the CPU; `threads` is how many cores one call may use."""
    if not path.is_file():
        raise FileNotFoundError(2, "no such file", str(path))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # idle threads sleep: spinning ones take the cores from the answers of others
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # what goes wrong is raised, and told without values
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own share no other class
        raise ValueError(
            f"expected an ONNX file that `queryfoil export --to onnx` wrote, but onnxruntime does not read {path}: "
            f"{str(error).splitlines()[0]}"
        ) from None


def about(path: Path, loaded: onnxruntime.InferenceSession, unprotected: bool = False) -> About:
    """What a file says of itself, checked against its graph.

    ValueError for a file that `queryfoil export` has not written, for one that takes scores, for a graph with other
    inputs or outputs, and for a model without a defense unless that is what is wanted.
    """
    text = loaded.get_modelmeta().custom_metadata_map.get(KEY)
    if text is None:
        raise ValueError(
            f"expected an ONNX file that `queryfoil export` wrote, but {path} has no metadata {KEY!r}, so that nothing "
            "says whether its scores are protected; export your model with `queryfoil export MODEL --fit fit.json`"
        )
    try:
        found = About.model_validate(json.loads(text))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"the metadata {KEY!r} of {path} is not as `queryfoil export` writes it: {where}: "
                         f"{first['msg']}") from None  # fmt: skip
    except ValueError as error:
        raise ValueError(f"the metadata {KEY!r} of {path} is not as `queryfoil export` writes it: {error}") from None
    if found.input != INPUT:
        raise ValueError(
            f"{path} protects scores that it is given, so serving it would need clients who have the unprotected ones; "
            "export the model with its protection"
        )
    _check_graph(path, loaded, found)
    if found.defense is None and not unprotected:
        raise ValueError(
            f"{path} has no defense: its scores would be shown as they are; export it with --fit, or pass "
            "--unprotected if that is what you want"
        )
    return found


def _check_graph(path: Path, loaded: onnxruntime.InferenceSession, found: About) -> None:
    """ValueError unless the graph maps images to scores of the declared sizes and gives nothing else."""
    if len(found.input_shape) != 3 or min(found.input_shape) < 1:
        raise ValueError(f"expected {path} to take images (C, H, W), but it declares {found.input_shape}")
    sizes = {INPUT: found.input_shape, OUTPUT: (found.classes,)}
    for kind, name, parts in (("input", INPUT, loaded.get_inputs()), ("output", OUTPUT, loaded.get_outputs())):
        if [part.name for part in parts] != [name]:
            names = ", ".join(part.name for part in parts)
            raise ValueError(f"expected {path} to have one {kind}, {name}, but it has {names}; export it again")
        shape = tuple(parts[0].shape[1:])
        fits = len(shape) == len(sizes[name]) and all(
            own == told for own, told in zip(shape, sizes[name], strict=True) if isinstance(own, int)
        )
        if parts[0].type != "tensor(float)" or not fits:
            raise ValueError(
                f"expected {name} of {path} as float32 (batch, {', '.join(map(str, sizes[name]))}), but they are "
                f"{parts[0].type} {tuple(parts[0].shape)}; export it again"
            )
        if isinstance(parts[0].shape[0], int):
            raise ValueError(f"expected {path} to take batches of any size, but it takes {parts[0].shape[0]} alone")
