"""The command line: a mirror of the library, one short function a command."""

import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from queryfoil import __version__, attacking, cluster, grid, list_command, options, plan, prepare, scan_command
from queryfoil import bench as running
from queryfoil.chunks import CHUNK
from queryfoil.compare import command as comparing
from queryfoil.data import read_npz
from queryfoil.deploy import audit_command, export_command, serve_command
from queryfoil.flags import command as checking
from queryfoil.protect import about
from queryfoil.protect import fit as fit_logits
from queryfoil.report import cells, page, queries_command
from queryfoil.report import reproduction as account
from queryfoil.terminal import Display, console, errors, finished, plainly, results
from queryfoil.train import loop, recipe

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Protect a classifier's scores from score-based query attacks, and measure what that is worth.",
)
DataFolders = Annotated[
    list[str] | None,
    typer.Option("--data", metavar="[NAME=]FOLDER", help="Folder of a data set that does not ship; repeat with names."),
]


def _seconds(minutes: float | None) -> float | None:
    return None if minutes is None else 60 * minutes


TimeLimit = Annotated[
    float | None,
    typer.Option(min=0, callback=_seconds, help="Minutes after which to stop at the end of a chunk."),
]
ChunkSize = Annotated[
    int, typer.Option(min=1, help="Images a chunk: what a killed run can lose. Does not change results.")
]


@app.command()
@plainly
def bench(
    name: Annotated[
        str, typer.Argument(metavar="PLAN", help="A plan file (.toml) or a shipped plan: see `queryfoil list`.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for results; a folder of the same plan is continued.")],
    scale: Annotated[
        str | None,
        typer.Option(help="For plans of the paper: small (shipped networks and images) or paper; small if left out."),
    ] = None,
    checkpoints: Annotated[
        Path, typer.Option(help="Folder with the published weights that the scale paper needs.")
    ] = grid.CHECKPOINTS,
    data: DataFolders = None,
    device: options.Device = "cpu",
    time_limit: TimeLimit = None,
    chunk: ChunkSize = CHUNK,
    share: Annotated[
        Path | None,
        typer.Option(help="Folder in which plans share their cells, so that each is computed once; else in --out."),
    ] = None,
    images: Annotated[
        bool, typer.Option("--images/--no-images", help="Store the adversarial images, or leave them out.")
    ] = True,
    engine: options.Engine = "process",
    address: options.Address = None,
    gpus_per_task: options.GpusPerTask = None,
) -> None:
    """Run a plan's attacks and write summary.json, images.parquet, report.md and report.html.

    Can be stopped at any moment and continued by the same command, with the same result; by either engine.
    """
    workers = cluster.engine(engine, address, gpus_per_task)
    chosen = plan.read(name, scale, checkpoints)
    folders = prepare.folders(data or [])
    with Display() as report:
        outcome = running.bench(chosen, out, folders, device, time_limit, chunk, report, share, images, engine=workers)
    finished(outcome)
    report_command(out)


@app.command()
@plainly
def attack(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A shipped name, NAME=PATH of published weights, `module:function`, or a file (ONNX, TorchScript, "
            "torch.export).",
        ),
    ],
    images: Annotated[
        str,
        typer.Option(
            help="A data set (NAME or NAME=FOLDER), a folder with labels.csv, one image of it, or a NumPy file (.npz)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for results; a folder of the same settings is continued.")],
    attack: Annotated[str, typer.Option(help="Name of the attack: see `queryfoil list`.")] = "square",
    norm: options.Norm = "linf",
    eps: options.Eps = None,
    budget: Annotated[int, typer.Option(help="Most queries an image, the clean one included.")] = 2500,
    n: Annotated[int | None, typer.Option("--n", help="Attack the first n images; all if left out.")] = None,
    seed: options.Seed = 0,
    loss: Annotated[str | None, typer.Option(help="What the attacker minimizes; the attack's own if left out.")] = None,
    accept: Annotated[
        str, typer.Option(help="Acceptance rule of a random search; `queryfoil list` shows all.")
    ] = "greedy",
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A hyper-parameter of the attack; repeat.")
    ] = None,
    targeted: Annotated[
        bool, typer.Option("--targeted", help="Aim at a wrong class: the image's target, or a random one.")
    ] = False,
    output: options.Output = None,
    mean: options.Mean = None,
    std: options.Std = None,
    size: options.Size = None,
    defense: options.Defense = None,
    defense_set: options.DefenseSet = None,
    fit: options.FitFile = None,
    device: options.Device = "cpu",
    time_limit: TimeLimit = None,
    chunk: ChunkSize = CHUNK,
) -> None:
    """Attack a model on your images: adversarial images as PNG, images.parquet and summary.json.

    Can be stopped at any moment and continued by the same command, with the same result.
    """
    request = attacking.request(
        model=model, output=output, mean=mean, std=std, size=size,
        defense=defense, defense_hyper=attacking.hyper(defense_set or []), fit=fit,
        images=images, n=n, attack=attack, norm=norm, eps=options.radius(eps, norm),
        budget=budget, seed=seed, loss=loss, accept=accept, hyper=attacking.hyper(setting or []), targeted=targeted,
    )  # fmt: skip
    with Display() as report:
        outcome, rows = attacking.attack(request, out, device, time_limit, chunk, report)
    finished(outcome)
    results(rows, "model")
    console.print(f"adversarial images: {attacking.about_pictures(rows[0])}", markup=False, soft_wrap=True)
    console.print(f"results: {out.resolve()}", markup=False, soft_wrap=True)


app.command("check")(checking.command)
app.command("scan")(scan_command.command)
app.command("export")(export_command.command)
app.command("serve")(serve_command.command)
app.command("audit")(audit_command.command)


@app.command("report")
@plainly
def report_command(
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="A folder that `queryfoil bench` has finished.")
    ] = None,
    log: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder of `queryfoil serve --query-log` instead.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="With --log: the page to write; report.html in the folder if left out.")
    ] = None,
    since: Annotated[datetime | None, typer.Option(help="With --log: leave out what is older; in UTC.")] = None,
) -> None:
    """Make the report of a finished folder again, from what is stored there, and print its table.

    With --log, that of a query log: which clients look like attackers, and why. docs/watch.md has more.
    """
    if (folder is None) == (log is None):
        raise ValueError("expected a folder of `queryfoil bench`, or --log and that of a query log; pass one of them")
    if log is not None:
        queries_command.report(log, out, since)
        return
    if folder is None or out is not None or since is not None:
        raise ValueError("--out and --since are for --log alone; the report of a folder is written there")
    rows = page.write(folder)
    results(rows, cells.subject(rows))
    console.print(f"report: {(folder / 'report.html').resolve()}", markup=False, soft_wrap=True)


app.command("compare")(comparing.command)


@app.command()
@plainly
def reproduction(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder with a folder of `queryfoil bench` for each plan.")
    ],
    out: Annotated[Path, typer.Option(help="Markdown file to write; figures go to images/reproduction beside it.")],
) -> None:
    """Write the account of a reproduction: the paper's claims, tables and figures, from what plans have recorded."""
    found = Table(box=None, padding=(0, 2))
    for heading in ("the paper's claim", "here"):
        found.add_column(heading)
    for judged in account.write(folder, out):
        found.add_row(judged.claim, judged.verdict)
    console.print(found)
    console.print(f"account: {out.resolve()}", markup=False, soft_wrap=True)


@app.command()
@plainly
def train(
    name: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe file (.toml) or a shipped recipe: see `queryfoil list`.")
    ],
    data: Annotated[Path, typer.Option(help="Folder with the full data set: see docs/data-sets.md.")],
    out: Annotated[Path, typer.Option(help="Folder for the weights (safetensors) and their card (JSON).")],
    device: options.Device = "cpu",
) -> None:
    """Train a network by a recipe; a killed run continues after its last finished epoch."""
    chosen = recipe.read(name)

    def report(epoch: loop.Epoch) -> None:
        bar.update(task, completed=epoch.epoch)
        if not errors.is_terminal:
            console.print(
                f"epoch {epoch.epoch}/{epoch.epochs}: loss {epoch.loss:.4f}, test accuracy {epoch.accuracy:.4f}"
            )

    with Progress(
        TextColumn(chosen.name), BarColumn(), MofNCompleteColumn(), TextColumn("epochs, left"), TimeRemainingColumn(),
        console=errors, disable=not errors.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=chosen.epochs)
        card = loop.train(chosen, data, out, device, report)
    console.print(
        f"{out / chosen.name}.safetensors: test accuracy {card['test_accuracy']:.4f}, ECE {card['test_ece']:.4f}"
    )


@app.command()
@plainly
def fit(
    logits: Annotated[
        Path,
        typer.Argument(
            help="A NumPy file (.npz) with arrays `logits` (N, K) and `labels` (N,), held out; of a model that gives "
            "probabilities, their logarithms."
        ),
    ],
    out: Annotated[Path, typer.Option(help="JSON file to write; `qf.load_fit` and `queryfoil attack --fit` read it.")],
    objective: Annotated[
        str, typer.Option(help="worst-case (terraces), greedy (AAA, as strong as stays calibrated), or paper (AAA).")
    ] = "worst-case",
    ranks: Annotated[
        int | None, typer.Option(help="worst-case: how many of the first classes keep their place; 1 if left out.")
    ] = None,
    allowed: Annotated[
        float | None, typer.Option(help="worst-case: by how much the AUROC may fall; 0.01 if left out.")
    ] = None,
    curve: Annotated[str | None, typer.Option(help="greedy: linear or sine; linear if left out.")] = None,
    tau: Annotated[float | None, typer.Option(help="greedy: period in units of logits; found if left out.")] = None,
    alpha: Annotated[float | None, typer.Option(help="AAA: reverse step; the paper's if left out.")] = None,
    beta: Annotated[float | None, typer.Option(help="AAA: weight of calibration; 5 if left out.")] = None,
    solver: Annotated[
        str | None, typer.Option(help="greedy: exact, or adam as in the paper; exact if left out.")
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(help="greedy: temperature nearest to 1 of the good ones, or lowest (ECE); nearest if left out."),
    ] = None,
) -> None:
    """Fit a protection to a model's held-out logits: terraces, or AAA."""
    given = {"ranks": ranks, "allowed": allowed, "curve": curve, "tau": tau, "alpha": alpha, "beta": beta}
    given |= {"solver": solver, "rule": rule}
    held_out = read_npz(logits, "logits", "labels")
    settings = {name: value for name, value in given.items() if value is not None}
    found = fit_logits(held_out["logits"], held_out["labels"], objective=objective, **settings)
    found.save(out)
    console.print(f"{out}: {about(found)}", markup=False, soft_wrap=True)


app.command("list")(list_command.command)


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        console.print(__version__)
        raise typer.Exit()


if __name__ == "__main__":
    sys.exit(app())
