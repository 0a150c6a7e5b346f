"""Quantization without training, by this project and by others: perplexity and time on the same model and text.

    python -m benchmarks.ptq --texts TEXTS           ours alone; results/ptq.json; a run that stopped goes on
    python -m benchmarks.ptq --texts TEXTS --peers llmcompressor=PYTHON autoround=PYTHON gptqmodel=PYTHON

TEXTS as in benchmarks/grids.py. PYTHON is the interpreter of an environment with llmcompressor, auto-round or
gptqmodel; a tool without one is left out. Every arm, ours too, is a process of its own (benchmarks/peers): it is given
the model of benchmarks/recipe.py and the calibration windows as files, quantizes the weights of all linear layers but
the head, and leaves them dequantized. They are checked (benchmarks/peers/check.py), put into the model and evaluated
here, alike for all. Seconds are those of quantizing, from a model on the CPU, without importing, loading and saving.
A tool may compile when it runs for the first time: `--repeats 2` gives each another, and the least seconds count.
Arms are kept by what was asked for, not by commit or version: after a change of a tool, give another --work.

A row for each scheme, method and tool. Tools run with their defaults; `llmcompressor-mse` chooses scales by squared
error instead of extremes. Integers are symmetric, but for AWQ asymmetric, as is its custom. Rows of ours have `peer_*`:
the peer with the best perplexity. `versions` are those of the tool's environment.
"""

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.peers import job as files
from benchmarks.peers.check import check_loss, check_weights
from benchmarks.peers.job import Job
from benchmarks.peers.run import run_tool
from benchmarks.recipe import LENGTH, MODEL, device, load, perplexity, tokenizer
from benchmarks.record import record
from benchmarks.texts import calibration, windows
from qat import transforms
from qat.atomic import replaced_file, replaced_folder

OURS, PEERS = "ours", ("llmcompressor", "autoround", "gptqmodel")
VARIANTS = {"llmcompressor-mse": {"observer": "memoryless_mse"}}
BATCH = 8
Row = dict[str, Any]


class Grid(NamedTuple):
    """Integers or codebooks; `group` inputs of a row share a scale or a codebook, all of them where it is 0."""

    kind: str
    bits: int
    group: int


class Arm(NamedTuple):
    """What one row is about."""

    scheme: str
    method: str
    tool: str


SCHEMES = {"int4-g64": Grid("int", 4, 64), "int3-g64": Grid("int", 3, 64), "kmeans3-row": Grid("kmeans", 3, 0)}
METHODS = {
    "int": {
        "rtn-minmax": (OURS,),
        "rtn-lsq": (OURS,),
        "gptq": (OURS, "llmcompressor", "llmcompressor-mse", "gptqmodel"),
        "awq": (OURS, "llmcompressor", "llmcompressor-mse"),
        "autoround": (OURS, "autoround"),
    },
    "kmeans": {"rtn": (OURS,), "gptq": (OURS,)},
}
ARMS = [
    Arm(scheme, method, tool)
    for scheme, grid in SCHEMES.items()
    for method, tools in METHODS[grid.kind].items()
    for tool in tools
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="folder of *.train.txt and wiki106.val.txt")
    parser.add_argument("--work", type=Path, default=Path("outputs/ptq"), help="where arms are kept")
    parser.add_argument("--peers", nargs="*", default=[], metavar="NAME=PYTHON", help=", ".join(PEERS))
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, help="all")
    parser.add_argument("--methods", nargs="+", choices=sorted({arm.method for arm in ARMS}), help="all")
    parser.add_argument("--calibration", type=int, default=128, help="windows of 512 tokens")
    parser.add_argument("--windows", type=int, default=0, help="of the evaluation text; 0 takes all")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model that is given"
    )
    parser.add_argument("--repeats", type=int, default=1, help="of every arm; seconds are the least of them")
    options = parser.parse_args()
    pythons = interpreters(options.peers)
    schemes, methods = options.schemes or SCHEMES, options.methods or [arm.method for arm in ARMS]
    arms = [arm for arm in ARMS if arm.scheme in schemes and arm.method in methods]
    run = [arm for arm in arms if not _left_out(arm, pythons)]
    for arm in arms:
        if arm not in run:
            print(f"left out: {'@'.join(arm)}: {_left_out(arm, pythons)}")
    train, val = windows(options.texts, LENGTH)
    given = calibration(train, options.calibration)
    bench = Benchmark(options.work, given, val[: options.windows or None], options.dtype, pythons, options.repeats)
    rows = [bench.fp(), *(bench.row(arm) for arm in track(run, description="arms"))]
    record("ptq", command(options, pythons), beside_peers(rows))


def command(options: argparse.Namespace, pythons: Mapping[str, str]) -> str:
    """What was run, without the places of this machine."""
    words = ["python -m benchmarks.ptq --texts TEXTS"]
    words += [f"--{name} {getattr(options, name)}" for name in ("calibration", "windows", "dtype", "repeats")]
    words += [f"--{name} {' '.join(chosen)}" for name in ("schemes", "methods") if (chosen := getattr(options, name))]
    peers = [f"{name}=PYTHON" for name in pythons if name != OURS]
    return " ".join([*words, *(["--peers", *peers] if peers else [])])


def interpreters(peers: Iterable[str]) -> dict[str, str]:
    """Interpreters by tool, from `NAME=PYTHON`, and our own."""
    found = {OURS: sys.executable}
    for entry in peers:
        name, _, python = entry.partition("=")
        if name not in PEERS:
            raise SystemExit(f"--peers {entry}: there is no tool '{name}', only {', '.join(PEERS)}.")
        if shutil.which(python) is None:
            raise SystemExit(f"--peers {entry}: no interpreter there; give {name}=PYTHON of its environment.")
        found[name] = str(Path(python).absolute()) if "/" in python else python
    return found


def _left_out(arm: Arm, pythons: Mapping[str, str]) -> str:
    """Why an arm cannot run, or nothing."""
    tool = _base(arm.tool)
    if tool not in pythons:
        return f"give --peers {tool}=PYTHON"
    if tool == OURS and not arm.method.startswith("rtn") and not hasattr(transforms, arm.method):
        return f"there is no qat.transforms.{arm.method}"
    return ""


def _base(tool: str) -> str:
    """The script of a tool, without what makes it a variant."""
    return tool.partition("-")[0]


def beside_peers(rows: list[Row]) -> list[Row]:
    """`rows`, those of ours with the peer that has the best perplexity at the same scheme and method."""
    found = []
    for row in rows:
        peers = [p for p in rows if p["tool"] != OURS and (p["scheme"], p["method"]) == (row["scheme"], row["method"])]
        best = min(peers, key=lambda peer: peer["ppl"], default={}) if row["tool"] == OURS else {}
        found.append(row | {f"peer_{ours}": best.get(theirs) for ours, theirs in _PEER_FIELDS.items()})
    return found


_PEER_FIELDS = {"name": "tool", "ppl": "ppl", "seconds": "seconds"}


class Benchmark:
    """Arms, each run once and kept in `work`.

    Args:
        calibration: windows `[n, tokens]` that every tool is given.
        val: windows of the evaluation text.
        dtype: of the model that every tool is given.
        pythons: interpreters by tool.
        repeats: of every arm; the weights of the first are evaluated.
    """

    def __init__(
        self,
        work: Path,
        calibration: Tensor,
        val: Tensor,
        dtype: str,
        pythons: Mapping[str, str],
        repeats: int = 1,
    ) -> None:
        self.work, self.calibration, self.val, self.dtype = work.absolute(), calibration, val, dtype
        self.pythons, self.repeats = pythons, repeats
        self.inputs = self.work / f"inputs-{_digest(MODEL, dtype, calibration.numpy().tobytes())}"

    def fp(self) -> Row:
        """The row of the model that nothing was done to."""
        path = self.work / f"fp-{_digest(MODEL, self.val.numpy().tobytes(), device())}.json"
        ppl = _kept(path, lambda: {"ppl": perplexity(load(), self.val)})["ppl"]
        row = {"scheme": "fp", "method": "fp", "tool": "fp", "ppl": ppl, "ppl_fp": ppl, "seconds": None}
        return row | {"peak_gib": None} | self._common()

    def row(self, arm: Arm) -> Row:
        """The row of one arm."""
        job = self.job(arm)
        key = _digest(replace(job, inputs=self.inputs.name), self.val.numpy().tobytes(), self.repeats)
        name = f"{'@'.join(arm)}-{key}"
        row = _kept(self.work / f"{name}.json", lambda: self._measured(arm, job, self.work / name))
        for weights in (self.work / name).glob(f"*/{files.WEIGHTS}"):
            weights.unlink()
        print(row, flush=True)
        return row

    def job(self, arm: Arm) -> Job:
        """What the tool of `arm` is asked for."""
        grid = SCHEMES[arm.scheme]
        options = VARIANTS.get(arm.tool, {})
        symmetric = arm.method != "awq"
        return Job(
            str(self.inputs), arm.method, grid.kind, grid.bits, grid.group, symmetric, BATCH, str(device()), options
        )

    def _measured(self, arm: Arm, job: Job, folder: Path) -> Row:
        results = [self._result(arm, job, folder / str(index)) for index in range(self.repeats)]
        symmetric = job.symmetric if job.grid == "int" else None
        row = arm._asdict() | {"symmetric": symmetric, "group_size": job.group_size} | results[0]["settings"]
        row |= {"ppl": self._evaluated(arm, job, folder / "0", results[0]["loss"]), "ppl_fp": self.fp()["ppl"]}
        peak = results[0]["peak_bytes"]
        row |= {"seconds": min(result["seconds"] for result in results), "repeats": self.repeats}
        row |= {"peak_gib": None if peak is None else peak / 2**30, "versions": results[0]["versions"]}
        return row | self._common()

    def _result(self, arm: Arm, job: Job, folder: Path) -> Row:
        """What the tool of `arm` wrote in `folder`, now or before the run was stopped."""
        if not (folder / files.RESULT).is_file():
            self._write_inputs()
            run_tool(self.pythons[_base(arm.tool)], _base(arm.tool), job, folder)
        result: Row = json.loads((folder / files.RESULT).read_text())
        return result

    def _evaluated(self, arm: Arm, job: Job, folder: Path, own_loss: float) -> float:
        """Perplexity with the weights that a tool left, which must be what it says that they are."""
        model, weights = load(), load_file(folder / files.WEIGHTS)
        check_weights("@".join(arm), weights, model, job.bits, job.group_size)
        model.load_state_dict(weights, strict=False)
        check_loss("@".join(arm), own_loss, files.loss(model, self.calibration[:BATCH], job.device))
        return perplexity(model, self.val)

    def _write_inputs(self) -> None:
        if not self.inputs.is_dir():
            with replaced_folder(self.inputs) as temporary:
                load().to(getattr(torch, self.dtype)).save_pretrained(temporary / files.MODEL)
                tokenizer().save_pretrained(temporary / files.MODEL)
                save_file({"input_ids": self.calibration.contiguous()}, temporary / files.CALIBRATION)

    def _common(self) -> Row:
        row = {"model": MODEL, "text": "wiki106.val", "windows": len(self.val), "dtype": self.dtype}
        return row | {"calibration_windows": len(self.calibration)}


def _kept(path: Path, measure: Callable[[], Row]) -> Row:
    if not path.is_file():
        row = measure()
        with replaced_file(path) as temporary:
            temporary.write_text(json.dumps(row))
    kept: Row = json.loads(path.read_text())
    return kept


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


if __name__ == "__main__":
    main()
