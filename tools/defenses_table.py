"""Write the table of all defenses into docs/choose-a-defense.md, from the recorded plan and its costs.

python tools/defenses_table.py    # after `queryfoil bench defenses --out results/defenses --share results/shared`
                                  # and `python benchmarks/cost.py defenses --out results/cost-defenses.json`
"""

import json
from pathlib import Path

from queryfoil import files

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def main() -> None:
    """Replace what stands between the two marks."""
    rows = json.loads((ROOT / "results/defenses/summary.json").read_text(encoding="utf-8"))
    costs = json.loads((ROOT / "results/cost-defenses.json").read_text(encoding="utf-8"))["rows"]
    cost = {row["label"]: row["ratio"] for row in costs}
    lines = [
        "| defense | n | clean accuracy | ECE | at 100 | at 2,500 | successes that repeat | cost |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        left = {
            q: f"{100 * row['accuracy'][q]:.1f} ({_interval(row['accuracy_interval'][q])})" for q in ("100", "2500")
        }
        clean = f"{100 * row['clean_accuracy']:.1f} ({_interval(row['clean_accuracy_interval'])})"
        ece = f"{100 * row['ece']:.2f} ({100 * row['ece_interval'][0]:.1f}–{100 * row['ece_interval'][1]:.1f})"
        repeat = "" if row["confirmed"] is None else f"{100 * row['confirmed']:.0f}"
        lines.append(
            f"| {row['label']} | {row['n']} | {clean} | {ece} | {left['100']} | {left['2500']} | {repeat} | "
            f"{cost[row['label']]:.2f} |"
        )
    page = ROOT / "docs/choose-a-defense.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    files.write_text(page, "\n".join([before + BEGIN, *lines, END + after]))


def _interval(interval: list[float]) -> str:
    return f"{100 * interval[0]:.0f}–{100 * interval[1]:.0f}"


if __name__ == "__main__":
    main()
