"""The model card that goes along with an export: what it was made from, how, and what was measured."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import yaml


class Recipe(NamedTuple):
    """How a model came about.

    base: the name of the model that was quantized.
    title: of the run: how it was quantized, and on which data.
    command: that made it; None where it was not one.
    """

    base: str
    title: str
    command: str | None = None


def model_card(recipe: Recipe, rows: Collection[Mapping[str, Any]], report: Mapping[str, Any]) -> str:
    """The text of `README.md`, with the front matter of the hub.

    Args:
        recipe: how the model came about.
        rows: of the run's results.
        report: what `parity.json` holds.
    """
    return "\n".join([_front_matter(recipe), *_origin(recipe), *_results(rows), *_parity(report), ""])


def _front_matter(recipe: Recipe) -> str:
    fields: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    fields["tags"] = ["quantization", "quantization-aware-training", "lightning-qat"]
    if not recipe.base.startswith(("/", ".", "~")):  # a folder means nothing elsewhere
        fields["base_model"] = recipe.base
    return f"---\n{yaml.safe_dump(fields, sort_keys=False).strip()}\n---"


def _origin(recipe: Recipe) -> list[str]:
    made = f"\n# {recipe.base}: {recipe.title}\n", "Made from the base model by lightning-qat"
    return [*made] if recipe.command is None else [*made, f"\n```bash\n{recipe.command}\n```"]


def _results(rows: Collection[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = [f"| {row['row']} | {row['perplexity']:.3f} | {row['bits_per_weight']:.3f} |" for row in rows]
    return ["\n## Results\n", "| model | perplexity | bits per weight |", "|---|---:|---:|", *lines]


def _parity(report: Mapping[str, Any]) -> list[str]:
    engine = report["engine"]
    named = {"packed, read back": report["packed, read back"]}
    if engine["name"]:
        named[engine["name"]] = engine
    heading = ["\n## Parity\n", f"Beside the trained, fake-quantized model, on {report['tokens']} tokens:\n"]
    table = ["| model | max delta logit | KL, nats | same top-1 | perplexity |", "|---|---:|---:|---:|---:|"]
    for name, found in named.items():
        figures = f"{found['max_abs_delta_logit']:.2e} | {found['kl']:.2e} | {found['top1_agreement']:.2%}"
        table.append(f"| {name} | {figures} | {found['perplexity']:.3f} |")
    stored = []
    if "bits_per_weight_claimed" in report:
        claimed, actual = report["bits_per_weight_claimed"], report["bits_per_weight_actual"]
        stored = [f"\n{claimed:.3f} bits a weight with scales and zero points, {actual:.3f} in the files."]
    return [*heading, *table, *stored]
