"""What was claimed of quantization, and what the result files say to it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.record import RESULTS, ROOT

Rows = list[dict[str, Any]]
# Whether a claim holds, and the figure; None where the rows do not tell.
Finding = tuple[bool, str] | None

# A claim is confirmed by a figure that reaches this share of what it says.
ENOUGH = 0.95
# Perplexities this close are called equal.
_EQUAL = 1.01


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        text: what it says.
        source: the result file that answers it, and the module of benchmarks/ that writes it; None for arithmetic.
        judge: of the rows of that file; None where no machine here can answer.
        options: what that module is called with.
        reason: why no machine here can answer.
    """

    text: str
    source: str | None
    judge: Callable[[Rows], Finding] | None
    options: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Answer:
    """What is known of one claim: a verdict, a figure, and where that comes from."""

    claim: str
    verdict: str
    figure: str
    origin: str


def answers() -> list[Answer]:
    """Those of all claims, by the result files as they are."""
    return [answer(claim) for claim in CLAIMS]


def answer(claim: Claim) -> Answer:
    """What the result file of `claim` says, or which command would."""
    if claim.judge is None:
        return Answer(claim.text, "untestable here", claim.reason, "")
    path = RESULTS / f"{claim.source}.json"
    if claim.source is None:
        finding, origin = claim.judge([]), "arithmetic of shapes, `benchmarks/claims.py`"
    elif path.is_file():
        result = json.loads(path.read_text())
        finding, origin = claim.judge(result["rows"]), f"`{path.name}`: `{result['command']}`"
    else:
        finding, origin = None, _writer(claim.source, claim.options)
    if finding is None:
        return Answer(claim.text, "not measured yet", "", origin)
    return Answer(claim.text, "confirmed" if finding[0] else "refuted", finding[1], origin)


def _writer(source: str, options: str) -> str:
    """What will write a result file."""
    if (ROOT / "benchmarks" / f"{source}.py").is_file():
        return f"`{source}.json` by `{' '.join(filter(None, [f'python -m benchmarks.{source}', options]))}`"
    return f"`{source}.json`, whose benchmark is not written yet"


def _memory(rows: Rows) -> Finding:
    bits = {row["grid"]: row["bits_per_weight"] for row in rows}
    saved = {grid: 1 - bits[grid] / 16 for grid in ("int4-g64", "nf4-g64", "kmeans4-row") if grid in bits}
    if not saved:
        return None
    figures = [f"{share:.1%} ({grid}, {bits[grid]:.2f} bits with scales)" for grid, share in saved.items()]
    return max(saved.values()) >= ENOUGH * 0.75, "; ".join(figures)


def _size(pruned: bool, before: float, after: float) -> Callable[[Rows], Finding]:
    """The size of the 13B shape, if it shrinks as `before` to `after` would."""

    def judge(rows: Rows) -> Finding:
        row = next((row for row in rows if bool(row["removed"]) == pruned and row["arm"].endswith("int4-g128")), None)
        if row is None:
            return None
        ratio = row["bf16_bytes"] / row["bytes"]
        figure = f"{row['bf16_bytes'] / 1e9:.1f} GB to {row['bytes'] / 1e9:.1f} GB, {ratio:.1f}x"
        if row["layers_done"] < row["layers"]:
            figure += f", from {row['layers_done']} of {row['layers']} layers"
        return ratio >= ENOUGH * before / after, figure

    return judge


def _decoding(model: str, times: float) -> Callable[[Rows], Finding]:
    """Tokens a second of one sequence in four bits, beside the dense model in bf16."""

    def judge(rows: Rows) -> Finding:
        own = [row for row in rows if row["model"] == model and row["batch"] == 1 and "4" in row["format"]]
        best = max(own, key=lambda row: row["speedup"], default=None)
        return best and (best["speedup"] >= ENOUGH * times, f"{best['speedup']:.1f}x ({best['format']})")

    return judge


def _four_bits(row: dict[str, Any]) -> bool:
    return 4 <= row["bits_per_weight"] < 5


def _trained_loss(rows: Rows) -> Finding:
    best = min((row for row in rows if _four_bits(row)), key=lambda row: row["ppl_qat"], default=None)
    return best and _rise(best["ppl_qat"], best["ppl_fp"], best["grid"])


def _untrained_loss(rows: Rows) -> Finding:
    own = [row for row in rows if row.get("tool") == "ours" and row["scheme"].startswith(("int4", "kmeans4", "nf4"))]
    best = min(own, key=lambda row: row["ppl"], default=None)
    return best and _rise(best["ppl"], best["ppl_fp"], f"{best['method']} {best['scheme']}")


def _rise(ppl: float, ppl_fp: float, name: str) -> Finding:
    return ppl / ppl_fp < 1.01, f"perplexity +{ppl / ppl_fp - 1:.1%}, the best of four bits ({name})"


def _codebooks(rows: Rows) -> Finding:
    codebooks = [row for row in rows if row["grid"].startswith("kmeans4") and _four_bits(row)]
    uniform = next((row for row in rows if row["grid"] == "int8-row"), None)
    if not codebooks or uniform is None:
        return None
    best, reference = min(codebooks, key=lambda row: row["ppl_qat"]), min(uniform["ppl_qat"], uniform["ppl_rtn"])
    figure = f"perplexity {best['ppl_qat']:.2f} ({best['grid']}) against {reference:.2f} (int8-row)"
    return best["ppl_qat"] <= _EQUAL * reference, figure


def _mixed(rows: Rows) -> Finding:
    """The plan at a budget beside uniform bits of which it saves 40 %."""
    own = [row for row in rows if "ppl_larger" in row and _saved(row) >= ENOUGH * 0.4]
    best = min(own, key=lambda row: row["ppl_mixed"] / row["ppl_larger"], default=None)
    return best and (
        best["ppl_mixed"] <= _EQUAL * best["ppl_larger"],
        f"perplexity {best['ppl_mixed']:.2f} at {best['bits_per_weight']:.2f} bits against {best['ppl_larger']:.2f} "
        f"({best['larger']}), {_saved(best):.0%} saved",
    )


def _saved(row: dict[str, Any]) -> float:
    return 1 - float(row["bits_per_weight"] / row["larger_bits_per_weight"])


def _trainable(rows: Rows) -> Finding:
    shares = {
        f"rank {rank} on every linear layer of {name}": adapter_share(rank, *shape)
        for name, rank, shape in (
            ("LLaMA-65B", 64, (8192, 22016, 80, 64, 64, 128, 32000)),
            ("Llama-8B", 16, (4096, 14336, 32, 32, 8, 128, 128256)),
        )
    }
    figures = [f"{share:.2%} ({name})" for name, share in shares.items()]
    return min(shares.values()) <= 0.001 / ENOUGH, "; ".join(figures)


def adapter_share(
    rank: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, head_dim: int, vocabulary: int
) -> float:
    """Parameters of LoRA on every linear layer of an untied Llama's blocks, over the model's own."""
    q, kv = heads * head_dim, kv_heads * head_dim
    matrices = [(hidden, q), (hidden, kv), (hidden, kv), (q, hidden)]
    matrices += [(hidden, intermediate), (hidden, intermediate), (intermediate, hidden)]
    own = layers * sum(a * b for a, b in matrices) + 2 * vocabulary * hidden
    return rank * layers * sum(a + b for a, b in matrices) / own


def _large_finetune(rows: Rows) -> Finding:
    own = [row for row in rows if row["model"] == "65b" and row["arm"].startswith("ours")]
    least = min(own, key=lambda row: row["peak_gib"], default=None)
    return least and (least["peak_gib"] * 2**30 <= 48e9, f"{least['peak_gib'] * 2**30 / 1e9:.1f} GB")


_NO_WEIGHTS = "no trained weights of that size are at hand, and random ones have no accuracy to lose"
CLAIMS = [
    Claim("4-bit weights save 75 % of the memory of fp16", "grids", _memory),
    Claim("GPTQ takes a 13B model from 26 GB to 7 GB", "llama_13b", _size(False, 26, 7)),
    Claim("GPTQ makes a 13B model decode 3x faster", "decode", _decoding("13b", 3)),
    Claim("pruning and 4 bits take 48 GB to 4.8 GB", "llama_13b", _size(True, 48, 4.8), "--structured 0.8"),
    Claim("pruning and 4 bits are 5x faster", "decode", _decoding("13b-structured", 5)),
    Claim("4 bits lose < 1 % of accuracy, with training, at 135M", "grids", _trained_loss),
    Claim("4 bits lose < 1 % of accuracy, without training, at 135M", "ptq", _untrained_loss, "--texts TEXTS"),
    Claim("4 bits lose < 1 % of accuracy, at 13B and 65B", None, None, reason=_NO_WEIGHTS),
    Claim("4-bit non-uniform (k-means) is as good as 8-bit uniform", "grids", _codebooks),
    Claim("mixed precision saves 40 % at equal accuracy", "mixed", _mixed, "--texts TEXTS"),
    Claim("QLoRA trains 0.1 % of the parameters", None, _trainable),
    Claim("QLoRA fine-tunes 65B on 48 GB", "qlora", _large_finetune),
]
