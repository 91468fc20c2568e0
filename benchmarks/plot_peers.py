"""The picture of README: time and memory of the loss beside its peers, out of `benchmarks.loss`'s JSON.

python -m benchmarks.plot_peers benchmarks/results/gpu-loss.json docs/images/loss-h100.svg
"""

import argparse
import json
from pathlib import Path

CANDIDATES = {
    "ours": "okd-kernels",
    "compiled": "torch.compile",
    "eager": "PyTorch, whole logits",
    "liger_chunked": "Liger, chunked",
    "trl_chunked": "TRL, chunked",
}
DIVERGENCES = {"okd": "OKD, both sides learn", "forward_kl": "forward KL", "jsd": "JSD"}
GREY, OURS, OTHERS = "#7d7d7d", "#d9622b", "#7f9bb3"  # each readable on white and on black


def plot(results: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {
        "svg.fonttype": "none", "svg.hashsalt": "peers", "font.family": "sans-serif", "font.size": 11,
        "text.color": GREY, "axes.labelcolor": GREY, "ytick.color": GREY,
    }  # fmt: skip
    found = {r["case"]["divergence"]: {c["name"]: c for c in r["candidates"]} for r in results}
    with plt.rc_context(style):
        figure, axes = plt.subplots(2, len(DIVERGENCES), figsize=(9.2, 4.4), sharex="row", sharey=True)
        for column, (divergence, title) in zip(axes.T, DIVERGENCES.items(), strict=True):
            rows = [found[divergence].get(name) for name in CANDIDATES]
            times = [row and row["over_floor"] for row in rows]
            memory = [row and row["extra_bytes"] / 2**30 for row in rows]
            bars(column[0], times, "{:.2f} ×", start=1)
            bars(column[1], memory, "{:.1f} GiB")
            column[0].set_title(title, fontsize=12, fontweight="bold", color=GREY, loc="left")
            column[0].axvline(1, color=GREY, linewidth=1, linestyle=":")
        axes[0][0].invert_yaxis()
        axes[0][0].set_ylabel("time / bare GEMMs")
        axes[1][0].set_ylabel("memory")
        figure.tight_layout(w_pad=1.5, h_pad=1.5)
        figure.savefig(path, transparent=True, metadata={"Date": None})


def bars(axis, values: list[float | None], form: str, start: float = 0) -> None:
    axis.barh(range(len(values)), [v or 0 for v in values], color=[OURS] + [OTHERS] * (len(values) - 1), height=0.7)
    for y, value in enumerate(values):
        text = "no teacher gradient" if value is None else form.format(value)
        axis.annotate(text, (value or start, y), (4, 0), textcoords="offset points", va="center", fontsize=10)
    axis.set_yticks(range(len(values)), list(CANDIDATES.values()))
    axis.set_xticks([])
    axis.margins(x=0.28)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    plot(json.loads(options.results.read_text())["results"], options.picture)
