"""One table of an experiment, from what is kept of it: all arms, their leads by seed, and how good their guides were.

    python docs/evidence/summary.py docs/evidence/cpu16 self:random self:shuffled self:centre teacher:centre
    python docs/evidence/summary.py docs/evidence/cpu100 self:shuffled self:random --seeds 62 63 64 65 66 67
    python docs/evidence/summary.py docs/evidence/cpu16 --again docs/evidence/cpu16-again --seeds 45 46 47

Prints Markdown: for each arm accuracies at the end (mean ± deviation over seeds), leads over random masks of the same
seed with 95 % confidence intervals, and the rank-AUC of its guide from guides.json; leads after every epoch that was
judged; and paired, two-sided t tests of the differences that are named, by each measure.
"""

import argparse
import json
import sys
from pathlib import Path

from scipy.stats import ttest_1samp

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import reproduce


def differences(records: list[dict], arm: str, than: str, metric: str, epoch: int) -> list[float]:
    ours, theirs = (reproduce.by_seed(records, name, epoch, metric) for name in (arm, than))
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def main(folder: Path, tests: list[str], seeds: list[int] | None, again: Path | None = None):
    records = json.loads((folder / "results.json").read_text())
    if again is not None:
        repeats = json.loads((again / "results.json").read_text())
        repeated = {(record["arm"], record["seed"]) for record in repeats}
        records = [record for record in records if (record["arm"], record["seed"]) not in repeated] + repeats
    records = [record for record in records if seeds is None or record["seed"] in seeds]
    file = folder / "guides.json"
    guides = json.loads(file.read_text()) if file.exists() else {}
    arms = list(dict.fromkeys(record["arm"] for record in records))
    epochs = sorted({record["epoch"] for record in records})
    metrics = [metric for metric in reproduce.METRICS if any(metric in record for record in records)]
    last = epochs[-1]

    print("| | seeds | guide's rank-AUC | " + " | ".join(f"{metric} | - random" for metric in metrics) + " |")
    print("|---" * (3 + 2 * len(metrics)) + "|")
    for arm in arms:
        cells = [arm, str(len(reproduce.by_seed(records, arm, last, "linear")))]
        found = [auc for seed, auc in guides.get(arm, {}).items() if seeds is None or int(seed) in seeds]
        cells += [reproduce.show(found)]
        for metric in metrics:
            cells += [reproduce.show(list(reproduce.by_seed(records, arm, last, metric).values()))]
            lead = differences(records, arm, "random", metric, last)
            cells += [reproduce.show_leads(lead) if lead and arm != "random" else ""]
        print("| " + " | ".join(cells) + " |")

    if len(epochs) > 1:
        print("\n| linear, - random | " + " | ".join(f"epoch {epoch}" for epoch in epochs) + " |")
        print("|---" * (1 + len(epochs)) + "|")
        for arm in arms:
            if arm != "random":
                found = [differences(records, arm, "random", "linear", epoch) for epoch in epochs]
                print(f"| {arm} | " + " | ".join(reproduce.show(lead, "+") for lead in found) + " |")

    for test in tests:
        arm, than = test.split(":")
        if missing := {arm, than} - set(arms):
            sys.exit(f"there are no arms {', '.join(missing)}, but {', '.join(arms)}")
        for metric in metrics:
            found = differences(records, arm, than, metric, last)
            if len(found) > 1:
                (mean, deviation), (low, high) = reproduce.mean_and_deviation(found), reproduce.interval(found)
                print(f"\n{metric}, {arm} minus {than}, {len(found)} seeds: ", end="")
                print(f"{mean:+.2f} ± {deviation:.2f} ({low:+.2f} to {high:+.2f}), ", end="")
                print(f"p = {ttest_1samp(found, 0).pvalue:.2g}")
                print("by seed: " + ", ".join(f"{value:+.1f}" for value in found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("tests", nargs="*", metavar="ARM:THAN")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these (default: all)")
    parser.add_argument("--again", type=Path, help="a folder of repeats: they replace the runs of their arms and seeds")
    main(**vars(parser.parse_args()))
