"""What programs beside `queryfoil bench` share: a plan at a scale, with what it needs, by the same options."""

import argparse
from pathlib import Path

from queryfoil import grid, plan
from queryfoil.plan import Plan
from queryfoil.prepare import Supplies, folders, sources


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `queryfoil bench` that say what a plan means."""
    parser.add_argument("--scale", choices=grid.scales(), help="of a plan that has scales; small if left out")
    parser.add_argument("--data", action="append", default=[], metavar="NAME=FOLDER", help="of each data set")
    parser.add_argument("--checkpoints", type=Path, default=grid.CHECKPOINTS, help="folder with the published weights")
    parser.add_argument("--device", default="cpu")


def read(name: str, chosen: argparse.Namespace) -> tuple[Plan, Supplies]:
    """The plan of this name as the options say; ValueError that lists what is missing for it."""
    found = plan.read(name, chosen.scale, chosen.checkpoints)
    return found, Supplies(sources(found, folders(chosen.data)), chosen.device)
