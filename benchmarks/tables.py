"""The tables of README.md and docs/, made from benchmarks/results/.

python -m benchmarks.tables                      rewrites the pages between their markers
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.claims import Answer, answers
from benchmarks.record import RESULTS, ROOT
from qat.atomic import replaced_file

Rows = list[dict[str, Any]]

# A perplexity above this says only that a model is broken.
_BEYOND = 10_000


def main() -> None:
    """Rewrite every page."""
    for page in pages():
        with replaced_file(page) as temporary:
            temporary.write_text(filled(page.read_text()))


def pages() -> list[Path]:
    """README.md and every page of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str) -> str:
    """`text` with every table between `<!-- table:NAME -->` and `<!-- end -->` made anew."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- table:{match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table:(\w+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def default_job(rows: Rows) -> str:
    """Perplexity and size of the four models."""
    seconds = next(row["seconds"] for row in rows if "seconds" in row)
    lines = [_line("", "perplexity", "bits per weight", "MiB"), _line("---", "--:", "--:", "--:")]
    for row in rows:
        if "perplexity" in row:
            size = "" if row.get("mib") is None else f"{row['mib']:.0f}"
            lines.append(_line(row["row"], f"{row['perplexity']:.2f}", f"{row['bits_per_weight']:.2f}", size))
    return "\n".join([*lines, "", f"The whole command took {seconds / 60:.1f} minutes."])


def cpu_step(rows: Rows) -> str:
    """What fake quantization adds to a step."""
    lines = [_line("", "seconds a step", "added time", "peak GiB", "added memory"), _line("---", *["--:"] * 4)]
    for row in rows:
        figures = (f"{row['seconds']:.2f}", f"{row['added_time']:+.0%}", f"{row['peak_gib']:.2f}")
        arm = row["arm"] + (", compiled" if row.get("backend", "eager") != "eager" else "")
        lines.append(_line(arm, *figures, f"{row['added_memory']:+.0%}"))
    return "\n".join(lines)


def grids(rows: Rows) -> str:
    """Perplexity of every grid, rounded and trained; of one that was trained at several rates, the best."""
    best: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=_perplexity):
        best.setdefault(row["grid"], row)
    lines = [_line("grid", "bits per weight", "rounded", "trained", "learning rate"), _line("---", *["--:"] * 4)]
    for row in sorted(best.values(), key=lambda row: (-row["bits_per_weight"] // 1, _perplexity(row))):
        rounded = _shown(row["ppl_rtn"]) if "ppl_rtn" in row else ""
        bits = f"{row['bits_per_weight']:.2f}"
        lines.append(_line(row["grid"], bits, rounded, f"{_perplexity(row):.2f}", f"{row['learning_rate']:g}"))
    return "\n".join(lines)


def learning_rates(rows: Rows) -> str:
    """Perplexity of what was trained at every rate."""
    rates = sorted({row["learning_rate"] for row in rows})
    found = {(row["grid"], row["learning_rate"]): _perplexity(row) for row in rows}
    lines = [_line("grid", *(f"{rate:g}" for rate in rates)), _line("---", *["--:"] * len(rates))]
    for grid in dict.fromkeys(row["grid"] for row in rows):
        if all((grid, rate) in found for rate in rates):
            lines.append(_line(grid, *(f"{found[grid, rate]:.2f}" for rate in rates)))
    return "\n".join(lines)


def _perplexity(row: dict[str, Any]) -> float:
    """After training."""
    return float(row["ppl_qat"] if "ppl_qat" in row else row["ppl_fp"])


def _shown(perplexity: float) -> str:
    """To two places; of a model that knows nothing any more, only that."""
    return f"{perplexity:.2f}" if perplexity < _BEYOND else f"> {_BEYOND:,}"


def kv_cache(rows: Rows) -> str:
    """Perplexity of every layout of the cache, by what was trained."""
    arms = ["rounded", "trained without the cache", "trained"]
    found = {(row["scheme"], row["arm"]): f"{row['ppl']:.2f}" for row in rows if "ppl" in row}
    lines = [_line("", *arms), _line("---", *["--:"] * len(arms))]
    for scheme in dict.fromkeys(scheme for scheme, _ in found):
        lines.append(_line(scheme, *(found.get((scheme, arm), "") for arm in arms)))
    return "\n".join(lines)


def kv_memory(rows: Rows) -> str:
    """What a filled cache takes, beside one in bf16."""
    lines = [_line("cache", "tokens", "GiB", "bf16 GiB", "ratio"), _line("---", *["--:"] * 4)]
    for row in (row for row in rows if row["arm"] == "memory"):
        size = row["cache_gib"] if row["allocated_gib"] is None else row["allocated_gib"]
        lines.append(
            _line(row["scheme"], row["tokens"], f"{size:.3f}", f"{row['bf16_gib']:.3f}", f"{row['ratio']:.2f}")
        )
    return "\n".join(lines)


def kmeans_fit(rows: Rows) -> str:
    """Seconds to fit and to refresh codebooks, for a billion weights."""
    headings = ("codebooks", "entries", "weights are", "seconds to fit", "above the optimum", "seconds to refresh")
    lines = [_line(*headings), _line("---", "--:", "---", *["--:"] * 3)]
    for row in rows:
        billion = 1e9 / row["weights"]
        figures = (
            f"{row['seconds'] * billion:.2f}",
            f"{row['gap_percent']:.2f} %",
            f"{row['refresh_seconds'] * billion:.3f}",
        )
        lines.append(_line(row["sharing"], row["clusters"], row["distribution"], *figures))
    return "\n".join(lines)


def kmeans_1b(rows: Rows) -> str:
    """A fine-tune with codebooks beside one in bf16."""
    headings = ("", "tokens/s", "of bf16", "peak GiB", "of bf16", "refresh, of a step")
    lines = [_line(*headings), _line("---", *["--:"] * 5)]
    for row in rows:
        share = f"{row['refresh_share']:.1%}" if row["arm"].endswith("row") else ""
        figures = (f"{row['tokens_per_s']:,.0f}", f"{row['speed_ratio']:.2f}", f"{row['peak_gib']:.1f}")
        lines.append(_line(row["arm"], *figures, f"{row['memory_ratio']:.2f}", share))
    return "\n".join(lines)


def recovery(rows: Rows) -> str:
    """What training recovers of what the best rounding loses, by scheme and text; peers beside it."""
    headings = ("", "text", "full precision", "rounded, the best", "trained", "of full precision", "recovered", "peer")
    lines = [_line(*headings), _line("---", "---", *["--:"] * 6)]
    for row in rows:
        best = f"{_shown(row['ppl_ptq'])} ({row['ptq_name']})"
        share = "" if row["recovered"] is None else f"{row['recovered']:.0%}"
        if row["recovered_spread"] is not None:
            share += f" ± {row['recovered_spread']:.0%}"
        peer = ""
        if row.get("peer_recovered") is not None:
            peer = f"{row['peer_recovered']:.0%} ({row['peer_name']})"
        figures = f"{row['ppl_fp']:.2f}", best, f"{row['ppl_qat']:.2f}", f"{row['ratio']:.3f}", share, peer
        lines.append(_line(row["scheme"], row["text"], *figures))
    return "\n".join(lines)


def pruning(rows: Rows) -> str:
    """Perplexity, size and speed of every arm; the dense model's first."""
    headings = ("", "zeros or parts", "share gone", "weights", "perplexity", "bits per weight", "MiB", "µs a token")
    lines = [_line(*headings), _line("---", "---", "--:", "---", *["--:"] * 4)]
    for row in rows:
        figures = (f"{row['ppl']:.2f}", f"{row['bits_per_weight']:.2f}", f"{row['mib']:.0f}")
        speed = f"{row['seconds_per_token'] * 1e6:.1f}"
        lines.append(_line(row["arm"], row["pattern"], f"{row['sparsity']:.0%}", row["scheme"], *figures, speed))
    return "\n".join(lines)


def ptq(rows: Rows) -> str:
    """Perplexity and time of every tool, by scheme and method; the full-precision model's first."""
    headings = ("scheme", "method", "tool", "grid", "columns", "perplexity", "seconds", "peak GiB")
    lines = [_line(*headings), _line(*["---"] * 5, *["--:"] * 3)]
    for row in rows:
        grid = (
            {None: "codebook", True: "symmetric", False: "asymmetric"}[row["symmetric"]] if "symmetric" in row else ""
        )
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f}"
        peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}"
        order = row.get("act_order") or ""
        lines.append(_line(row["scheme"], row["method"], row["tool"], grid, order, _shown(row["ppl"]), seconds, peak))
    return "\n".join(lines)


def fake_quantize(rows: Rows) -> str:
    """The share of copying's speed that every kernel reaches, and how much longer the peer takes, over all matrices."""
    lines = [
        _line("grid", "scales", "pass", "of copying, worst", "best", "torch.compile, worst", "best"),
        _line(*["---"] * 3, *["--:"] * 4),
    ]
    kernels: dict[tuple[str, str, str], Rows] = {}
    for row in rows:
        kernels.setdefault((row["format"], row["granularity"], row["direction"]), []).append(row)
    for kernel, own in kernels.items():
        shares = _ends(own, lambda row: float(row["copy_share"]), ".0%")
        lines.append(_line(*kernel, *shares, *_ends(own, lambda row: row["peer_us"] / row["us"], ".2f", "x")))
    shapes = dict.fromkeys(_times(row["shape"]) for row in rows)
    return "\n".join([*lines, "", f"Matrices: {', '.join(shapes)}."])


def _ends(rows: Rows, figure: Callable[[dict[str, Any]], float], format: str, unit: str = "") -> list[str]:
    """The least and the greatest of a figure, and the matrices that they are of where these are several."""
    of = "" if len(rows) == 1 else " ({})"
    ends = min(rows, key=figure), max(rows, key=figure)
    return [f"{figure(row):{format}}{unit}{of.format(_times(row['shape']))}" for row in ends]


def train_step(rows: Rows) -> str:
    """Speed and memory of every arm beside bf16: eager, compiled, and with CUDA graphs."""
    lines = [_line("", "model", "", "tokens/s", "of bf16", "peak GiB", "of bf16"), _line(*["---"] * 3, *["--:"] * 4)]
    for row in rows:
        how = "CUDA graphs" if row.get("graphs") else "compiled" if row["compiled"] else "eager"
        speed = f"{row['tokens_per_s']:,.0f}", f"{row['speed_ratio']:.2f}"
        lines.append(
            _line(row["arm"], row["model"], how, *speed, f"{row['peak_gib']:.1f}", f"{row['memory_ratio']:.2f}")
        )
    return "\n".join(lines)


# Of bf16's speed: what is trained, how, by which arm, and the goal.
_GOALS = (
    ("fake quantization W4A8", "1b", "ours-w4a8", True, 0.93),
    ("fake quantization W4A8", "1b", "ours-w4a8", False, 0.85),
    ("learned codebooks of 4 bits", "1b", "ours-kmeans4-row", True, 0.90),
    ("fp8 products", "1b", "ours-w8a8g8-fp8", True, 1.1),
    ("fp8 products", "8b4", "ours-w8a8g8-fp8", True, 1.2),
)


def train_goals(rows: Rows) -> str:
    """Speed of what had a goal, with CUDA graphs and without."""
    lines = [_line("", "model", "", "goal", "found", "with CUDA graphs"), _line(*["---"] * 3, *["--:"] * 3)]
    found = {(row["model"], row["arm"], row["compiled"], row.get("graphs", False)): row["speed_ratio"] for row in rows}
    for what, model, arm, compiled, goal in _GOALS:
        plain, graphed = (found.get((model, arm, compiled, graphs)) for graphs in (False, True))
        figures = ("" if ratio is None else f"{ratio:.3f}" for ratio in (plain, graphed))
        lines.append(_line(what, model, "compiled" if compiled else "eager", goal, *figures))
    return "\n".join(lines)


def low_bit_step(rows: Rows) -> str:
    """The share of the products of codes, and of everything they need, of the products in bf16."""
    products = ("forward", "dgrad", "wgrad")
    lines = [
        _line("model", "layer", "codes", *products, "all three, with what they need"),
        _line(*["---"] * 3, *["--:"] * 4),
    ]
    layers: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in rows:
        if row["part"] in ("product", "all") and row["share"] is not None:
            of = row["model"], _times([row["in"], row["out"]]), row["compute"]
            layers.setdefault(of, {})[row["serves"]] = row["share"]
    for of, shares in layers.items():
        lines.append(_line(*of, *(f"{shares[part]:.2f}" for part in (*products, "all"))))
    return "\n".join(lines)


def loss_curve(rows: Rows) -> str:
    """How far apart the losses of kernels and references are."""
    headings = ("", "", "steps", "last loss", "largest difference", "mean", "references again")
    lines = [_line(*headings), _line("---", "---", *["--:"] * 5)]
    for row in rows:
        figures = [f"{row[name]:.1e}" if row[name] else "0" for name in ("largest", "mean", "again")]
        lines.append(_line(row["scheme"], row["dtype"], row["steps"], f"{row['last']:.3f}", *figures))
    return "\n".join(lines)


def loss_products(rows: Rows) -> str:
    """How far apart the losses of products of codes and of fake quantization are."""
    headings = ("products of codes", "steps", "last loss", "fake-quantized", "mean difference", "another order")
    lines = [_line(*headings), _line("---", *["--:"] * 5)]
    for row in rows:
        figures = f"{row['last']:.3f}", f"{row['last_expected']:.3f}", f"{row['mean']:.1e}", f"{row['noise']:.1e}"
        lines.append(_line(row["scheme"], row["steps"], *figures))
    return "\n".join(lines)


def loss(rows: Rows) -> str:
    """Time and memory of the loss at the head."""
    lines = [_line("head", "loss", "ms", "speed", "GiB", "memory"), _line("---", "---", *["--:"] * 4)]
    for row in rows:
        memory = f"{row['peak_gib']:.2f}", f"{row['memory_ratio']:.2f}"
        lines.append(_line(row["model"], row["arm"], f"{row['ms']:.1f}", f"{row['speed_ratio']:.2f}", *memory))
    return "\n".join(lines)


def decode(rows: Rows) -> str:
    """Speed of generation and size of the weights beside bf16."""
    headings = ("model", "linear layers", "context", "tokens/s", "bf16", "speed", "weights GiB", "bf16")
    lines = [_line(*headings), _line("---", "---", *["--:"] * 6)]
    for row in rows:
        speeds = (f"{row[name]:.0f}" for name in ("tokens_per_s", "bf16_tokens_per_s"))
        sizes = (f"{row[name]:.2f}" for name in ("weights_gib", "bf16_weights_gib"))
        lines.append(_line(row["model"], row["format"], row["context"], *speeds, f"{row['speedup']:.2f}", *sizes))
    return "\n".join(lines)


def _times(shape: list[int]) -> str:
    return " x ".join(map(str, shape))


def claims(found: list[Answer]) -> str:
    """Every claim, what is known of it, and from where."""
    lines = [_line("claim", "answer", "figure", "from"), _line(*["---"] * 4)]
    return "\n".join([*lines, *(_line(own.claim, own.verdict, own.figure, own.origin) for own in found)])


def _of(file: str, show: Callable[[Rows], str]) -> Callable[[], str]:
    """The table of one result file, and what that was measured on."""

    def made() -> str:
        result = json.loads((RESULTS / f"{file}.json").read_text())
        return f"{show(result['rows'])}\n\n{_source(result)}"

    return made


# What a marker `<!-- table:NAME -->` shows.
TABLES: dict[str, Callable[[], str]] = {
    "claims": lambda: claims(answers()),
    "default_job": _of("default_job", default_job),
    "cpu_step": _of("cpu_step", cpu_step),
    "grids": _of("grids", grids),
    "learning_rates": _of("grids", learning_rates),
    "kv_cache": _of("kv_cache", kv_cache),
    "kv_memory": _of("kv_cache", kv_memory),
    "kmeans_fit_cuda": _of("kmeans_fit_cuda", kmeans_fit),
    "kmeans_fit_cpu": _of("kmeans_fit_cpu", kmeans_fit),
    "kmeans_1b": _of("kmeans_1b", kmeans_1b),
    "fake_quantize": _of("fake_quantize", fake_quantize),
    "train_step": _of("train_step", train_step),
    "train_goals": _of("train_step", train_goals),
    "low_bit_step": _of("low_bit_step", low_bit_step),
    "loss_curve": _of("loss_curve", loss_curve),
    "loss_products": _of("loss_products", loss_products),
    "loss": _of("loss", loss),
    "distill_loss": _of("distill_loss", loss),
    "decode": _of("decode", decode),
    "recovery": _of("recovery", recovery),
    "pruning": _of("pruning", pruning),
    "ptq": _of("ptq", ptq),
}


def _line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _source(result: dict[str, Any]) -> str:
    torch = result["versions"]["torch"]
    return f"<sub>{result['device']}; torch {torch}; commit {result['commit']}; `{result['command']}`</sub>"


if __name__ == "__main__":
    main()
