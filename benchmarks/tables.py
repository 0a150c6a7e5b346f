"""The README's tables, made from benchmarks/results/.

python -m benchmarks.tables                      rewrites README.md between its markers
"""

import json
import re
from collections.abc import Callable
from typing import Any

from benchmarks.record import RESULTS, ROOT
from qat.atomic import replaced_file

Rows = list[dict[str, Any]]


def main() -> None:
    """Rewrite the README."""
    path = ROOT / "README.md"
    with replaced_file(path) as temporary:
        temporary.write_text(filled(path.read_text()))


def filled(text: str) -> str:
    """`text` with every table between `<!-- table:NAME -->` and `<!-- end -->` made anew."""

    def table(match: re.Match[str]) -> str:
        result = json.loads((RESULTS / f"{match[1]}.json").read_text())
        return f"<!-- table:{match[1]} -->\n{TABLES[match[1]](result['rows'])}\n\n{_source(result)}\n<!-- end -->"

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
        lines.append(_line(row["arm"], *figures, f"{row['added_memory']:+.0%}"))
    return "\n".join(lines)


TABLES: dict[str, Callable[[Rows], str]] = {"default_job": default_job, "cpu_step": cpu_step}


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _source(result: dict[str, Any]) -> str:
    torch = result["versions"]["torch"]
    return f"<sub>{result['device']}; torch {torch}; commit {result['commit']}; `{result['command']}`</sub>"


if __name__ == "__main__":
    main()
