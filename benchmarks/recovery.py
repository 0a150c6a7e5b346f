"""Whether training with quantization beats rounding: every recipe, several seeds, and the same tokens for every arm.

    python -m benchmarks.recovery --texts TEXTS                     SmolLM2; writes results/recovery.json; resumes
    python -m benchmarks.recovery --texts TEXTS --schemes int4-g64 --seeds 0 --options optimizer.lr=5e-5

TEXTS is a folder with *.train.txt, *.val.txt and wiki106.val.txt, which nothing is trained on. Every GPU of the machine
takes one arm at a time; arms that are done lie in --work, and run again when what makes them changes. All of them are
runs of `python train.py`. For each seed:

1. `start` trains in full precision for --steps steps. All that follows starts from it.
2. `fp` trains on, in parts of --steps steps, as many as the longest recipe. Full precision is, beside each recipe, the
   best of `start` and of those parts that saw no more than it, by the evaluation texts of the mix.
3. `rtn`, `gptq` and `awq` quantize the best one; for each scheme the best of them, by the mix, is called `ptq`.
4. `ours` trains the recipe of the scheme (configs/experiment/) from `start`, on as many tokens as `fp`: those of a
   recipe of one part are the same in the same order.
5. Peers train alike: `torchao`, its fake quantization with the same format; `llm-qat`, extremes as scales and the
   teacher's logits alone (arXiv 2305.17888), in this framework.

`recovered` and `recovered_spread` are mean and standard deviation over seeds of the share of what rounding loses, as
`method=compare` has them (lightning_modules/comparison/outcome.py). Perplexity and next-token accuracy are over windows
of 512 tokens.
"""

import argparse
import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig

from benchmarks.gpus import spread
from benchmarks.record import ROOT, record
from benchmarks.texts import SEPARATOR
from lightning_modules.comparison.outcome import recovered
from lightning_modules.comparison.peers import PEERS
from lightning_modules.comparison.run import composed
from lightning_modules.evaluation import Text, evaluate
from lightning_modules.pipeline import Job
from qat.atomic import replaced_file
from qat.errors import InputError

# The recipe of each scheme, and in how many parts of --steps steps it trains.
SCHEMES = {
    "int4-g64": ("int4", 1),
    "int3-g64": ("int3", 1),
    "int2-g64": ("int2", 2),
    "kmeans4-row": ("kmeans4", 1),
    "kmeans3-row": ("kmeans3", 1),
    "kmeans2-row": ("kmeans2", 2),
    "nf4-g64": ("nf4", 1),
    "ternary": ("ternary", 2),
    "w8a8": ("w8a8", 1),
    "w4a8": ("w4a8", 1),
    "w4a4kv4": ("w4a4kv4", 1),
}
ROUNDED = ("rtn", "gptq", "awq")
MIX, WIKI = "mix.val", "wiki106.val"
_TRANSFORMS = {"rtn": "calibrate"}
_LLM_QAT = ("quantizer@scheme.weight=minmax", "scheme.weight.granularity=per_channel", "distill.weight=1.0")
_PEERS = {"int4-g64": {"torchao": ()}, "w4a8": {"llm-qat": _LLM_QAT}, "w4a4kv4": {"llm-qat": _LLM_QAT}}
_LENGTH, _PLAIN = 512, "pretrained"
# Of every run: what is trained on, and nothing that is not measured here.
_QUIET = ("export=none", "callbacks.monitor.every_n_steps=100000", "callbacks.checkpoint.every_n_steps=100000")
_LAST = "callbacks.checkpoint.save_at_end=false"

Row = dict[str, Any]


class Arm(NamedTuple):
    """One run.

    name: `start`, `fp`, of ROUNDED, `ours` or a peer.
    scheme: None in full precision.
    seed: of the order of windows.
    part: of `fp`, counted from 1.
    options: after all others.
    """

    name: str
    scheme: str | None
    seed: int
    part: int = 0
    options: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """What its files are called."""
        options = re.sub(r"[^\w.=-]+", "_", "-".join(self.options))
        return "-".join(filter(None, (self.name, str(self.part or ""), self.scheme, f"seed{self.seed}", options)))


class Plan(NamedTuple):
    """What all arms share.

    texts: folder of texts.
    work: folder of what arms leave.
    model: options that choose the model.
    steps: of a part.
    schemes: in their order.
    seeds: in their order.
    options: of every quantized training, after those of its recipe.
    given: of every run.
    scored: texts that every model is scored on; of the mix at least.
    """

    texts: Path
    work: Path
    model: tuple[str, ...]
    steps: int
    schemes: tuple[str, ...]
    seeds: tuple[int, ...]
    options: tuple[str, ...] = ()
    given: tuple[str, ...] = ()
    scored: tuple[str, ...] = (MIX, WIKI)

    @property
    def longest(self) -> int:
        """Parts of the longest recipe."""
        return max(SCHEMES[scheme][1] for scheme in self.schemes)

    def first(self) -> list[Arm]:
        """Arms that wait for none."""
        return [Arm("start", None, seed) for seed in self.seeds]

    def after(self, arm: Arm) -> list[Arm]:
        """Arms that wait for `arm`."""
        trained = [Arm(name, s, arm.seed) for s in self.schemes for name in ("ours", *_PEERS.get(s, {}))]
        # The longest first.
        trained.sort(key=lambda own: -SCHEMES[str(own.scheme)][1])
        if arm.name == "start":
            return [Arm("fp", None, arm.seed, 1), *trained]
        if arm.name != "fp":
            return []
        longer = [Arm("fp", None, arm.seed, arm.part + 1)] if arm.part < self.longest else []
        same = [scheme for scheme in self.schemes if SCHEMES[scheme][1] == arm.part]
        return [*longer, *(Arm(name, scheme, arm.seed) for scheme in same for name in ROUNDED)]

    def full_precision(self, seed: int, parts: int) -> list[Arm]:
        """Those that saw no more than a recipe of so many parts, among which full precision is the best."""
        return [Arm("start", None, seed), *(Arm("fp", None, seed, part + 1) for part in range(parts))]

    def row(self, arm: Arm) -> Row | None:
        """What `arm` found; None if it did not run yet."""
        path = self.work / f"{arm.key}.json"
        found: Row | None = json.loads(path.read_text()) if path.is_file() else None
        return found

    def best(self, seed: int, parts: int) -> Arm:
        """The arm that is called full precision beside recipes of so many parts, once all of them are there."""
        return min(self.full_precision(seed, parts), key=lambda arm: float(self.known(arm)[MIX]["perplexity"]))

    def known(self, arm: Arm) -> Row:
        """The same as `row`, of one that ran."""
        found = self.row(arm)
        assert found is not None, arm.key
        return found


def main() -> None:
    parser = parser_of(str(__doc__), Path("outputs/recovery"), list(SCHEMES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--options", nargs="+", default=[], help="options of train.py for the recipes")
    own = parser.parse_args()
    plan = plan_of(own, tuple(own.seeds), options=tuple(own.options))
    spread(partial(run, plan), plan.first(), plan.after, lambda arm: arm.key, own.per_gpu)
    record("recovery", command_of(plan, "recovery"), rows_of(plan), ("torchao", "triton"))


def parser_of(doc: str, work: Path, schemes: list[str]) -> argparse.ArgumentParser:
    """The arguments of every benchmark that is made of arms; `work` and `schemes` are what it takes without them."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="folder of *.train.txt and *.val.txt")
    parser.add_argument("--work", type=Path, default=work, help="where arms leave what they find")
    parser.add_argument("--steps", type=int, default=700, help="of a part; 700 are an epoch of 5.75 million tokens")
    parser.add_argument("--schemes", nargs="+", choices=schemes, default=schemes)
    parser.add_argument("--model", nargs="+", default=["model=smollm2"], help="options of train.py that choose it")
    parser.add_argument("--given", nargs="+", default=[], help="options of train.py for every run")
    parser.add_argument("--per-gpu", type=int, default=1, help="arms at a time on every GPU")
    return parser


def plan_of(own: argparse.Namespace, seeds: tuple[int, ...], **more: Any) -> Plan:
    """What those arguments ask for, its texts ready; `more` are fields of the plan."""
    model, schemes, given = tuple(own.model), tuple(own.schemes), tuple(own.given)
    plan = Plan(own.texts.resolve(), own.work.resolve(), model, own.steps, schemes, seeds, given=given, **more)
    split_texts(plan)
    return plan


def command_of(plan: Plan, benchmark: str) -> str:
    """How `benchmark` is run as it was."""
    command = f"python -m benchmarks.{benchmark} --texts TEXTS --steps {plan.steps}"
    for name in ("model", "schemes", "seeds", "options", "given"):
        own = getattr(plan, name)
        if own and (name != "seeds" or benchmark == "recovery"):
            command += f" --{name} {' '.join(map(str, own))}"
    return command


def split_texts(plan: Plan) -> None:
    """Folders of training texts and of the mix's evaluation texts, for `data=text`."""
    for kind in ("train", "val"):
        folder = plan.work / "texts" / kind
        folder.mkdir(parents=True, exist_ok=True)
        found = [path for path in plan.texts.glob(f"*.{kind}.txt") if path.name != f"{WIKI}.txt"]
        if not found:
            raise SystemExit(f"{plan.texts} holds no *.{kind}.txt.")
        for path in found:
            if not (folder / path.name).is_file():
                shutil.copy2(path, folder / path.name)


def run(plan: Plan, arm: Arm) -> Row:
    """Run `arm`, unless that was done, and keep its row."""
    found, made = plan.row(arm), made_from(plan, arm)
    plain = plan.work / arm.key / _PLAIN
    if found is not None and found["made"] == made and (arm.scheme is not None or plain.is_dir()):
        return found
    _clear_of_others(plan.work / arm.key, made)
    row: Row
    started = time.perf_counter()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"), composed(options_of(plan, arm)) as cfg:
        try:
            job = _job(arm, cfg)
            job.run()
            if arm.scheme is None:
                job.save_plain(plain)
            row = {"seconds": time.perf_counter() - started, **scores(plan, job)}
        except InputError as error:  # AWQ of a table, say
            if arm.name not in ROUNDED:
                raise
            row = {"refused": str(error)}
    row["made"] = made
    with replaced_file(plan.work / f"{arm.key}.json") as temporary:
        temporary.write_text(json.dumps(row))
    return row


def _clear_of_others(folder: Path, made: str) -> None:
    """Leave in `folder` what was interrupted, unless something else made it."""
    mark = folder / "made"
    if not mark.is_file() or mark.read_text() != made:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with replaced_file(mark) as temporary:
            temporary.write_text(made)


def made_from(plan: Plan, arm: Arm) -> str:
    """A hash of everything that decides what `arm` is: its options, its recipe, and what it starts from."""
    before = _before(plan, arm)
    recipe = ROOT / "configs" / "experiment" / f"{SCHEMES[arm.scheme][0]}.yaml" if arm.scheme else None
    parts = options_of(plan, arm), recipe and recipe.read_text(), before and plan.known(before)["made"]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _before(plan: Plan, arm: Arm) -> Arm | None:
    """The arm whose model `arm` loads."""
    if arm.name in ROUNDED:
        return plan.best(arm.seed, SCHEMES[str(arm.scheme)][1])
    if arm.name == "fp" and arm.part > 1:
        return Arm("fp", None, arm.seed, arm.part - 1)
    return None if arm.name == "start" else Arm("start", None, arm.seed)


def options_of(plan: Plan, arm: Arm) -> list[str]:
    """Options of `python train.py` for `arm`."""
    texts = plan.work / "texts"
    common = [
        *(f"data.{name}='{texts / kind}'" for name, kind in (("path", "train"), ("val_path", "val"))),
        *(
            "data=text",
            f"data.sequence_length={_LENGTH}",
            "data.batch_size=16",
            "trainer.precision=bf16-mixed",
            f"seed={arm.seed}",
        ),
        *(f"paths.output_dir='{plan.work / arm.key}'", f"paths.cache_dir='{plan.work / 'cache'}'", "resumed=true"),
        *(*_QUIET, _LAST, *plan.given),
    ]
    full = [*common, "method=fp", f"trainer.max_steps={plan.steps}", "optimizer.lr=3e-4"]
    if arm.name == "start":
        return [*full, *plan.model, *arm.options]
    before = _before(plan, arm)
    assert before is not None
    if arm.name == "fp":
        return [*full, *_loading(plan, before), "optimizer.lr=1e-4", *arm.options]
    recipe, parts = SCHEMES[str(arm.scheme)]
    if arm.name in ROUNDED:
        # Training windows alone: nothing is chosen by what is evaluated on.
        method = ["method=ptq", "distill=none", f"transforms={_TRANSFORMS.get(arm.name, arm.name)}"]
        calibration = ["calibration_batches=8", f"experiment={recipe}"]
        return [*common, *_loading(plan, before), *method, *calibration]
    trained = [*common, *_loading(plan, before), f"trainer.max_steps={parts * plan.steps}"]
    if arm.name in PEERS:
        return [*trained, "method=fp", "optimizer.lr=2e-5", *arm.options]
    own = _PEERS[str(arm.scheme)][arm.name] if arm.name != "ours" else plan.options
    return [*trained, f"experiment={recipe}", *own, *arm.options]


def _loading(plan: Plan, arm: Arm) -> list[str]:
    return ["model=hf", f"model.name='{plan.work / arm.key / _PLAIN}'", "model.attention=sdpa"]


def _job(arm: Arm, cfg: DictConfig) -> Job:
    if arm.name not in PEERS:
        return Job(cfg)
    scheme = compose("train", [f"experiment={SCHEMES[str(arm.scheme)][0]}"]).scheme
    return PEERS[arm.name](cfg, instantiate(scheme))


def scores(plan: Plan, job: Job) -> Row:
    """Perplexity and accuracy on both texts."""
    model = job.module.model.eval()
    model.to(job.trainer.strategy.root_device)
    with job.trainer.precision_plugin.forward_context():
        found = {name: evaluate(model, text, _LENGTH, _LENGTH, 8) for name, text in _evaluated(plan, job)}
    return {name: {"perplexity": own.perplexity, "accuracy": own.accuracy} for name, own in found.items()}


def _evaluated(plan: Plan, job: Job) -> Iterator[tuple[str, Text]]:
    paths = {MIX: sorted((plan.work / "texts" / "val").glob("*.txt")), WIKI: [plan.texts / f"{WIKI}.txt"]}
    tokenizer = job.loaded.tokenizer
    for name in plan.scored:
        files = paths[name]
        documents = [part.strip() for file in files for part in file.read_text().split(SEPARATOR) if part.strip()]
        encoded = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
        ids = torch.tensor([token for document in encoded for token in (*document, tokenizer.eos_token_id)])
        yield name, Text(ids, ids)


def rows_of(plan: Plan) -> list[Row]:
    """One row for each scheme and text."""
    return [_row(plan, scheme, text) for scheme in plan.schemes for text in (WIKI, MIX)]


def _row(plan: Plan, scheme: str, text: str) -> Row:
    def of(name: str, figure: str = "perplexity") -> list[float]:
        return [float(plan.known(Arm(name, scheme, seed))[text][figure]) for seed in plan.seeds]

    recipe, parts = SCHEMES[scheme]
    full = [plan.known(plan.best(seed, parts))[text] for seed in plan.seeds]
    rounded = [name for name in ROUNDED if all(MIX in plan.known(Arm(name, scheme, s)) for s in plan.seeds)]
    mixes = {
        name: mean(float(plan.known(Arm(name, scheme, s))[MIX]["perplexity"]) for s in plan.seeds) for name in rounded
    }
    best = min(mixes, key=lambda name: mixes[name])
    ppl_fp, ppl_ptq, ppl_qat = [float(own["perplexity"]) for own in full], of(best), of("ours")
    share = recovered(ppl_ptq, ppl_qat, ppl_fp)
    row: Row = {"scheme": scheme, "model": "smollm2" if plan.model == ("model=smollm2",) else plan.model[-1]}
    row |= {"text": text, "seeds": list(plan.seeds), "recipe": recipe, "parts": parts}
    row |= {"ppl_fp": mean(ppl_fp), "ppl_ptq": mean(ppl_ptq), "ptq_name": best, "ppl_qat": mean(ppl_qat)}
    row |= {f"ppl_{name}": mean(of(name)) for name in rounded}
    row |= {"ratio": mean(own / other for own, other in zip(ppl_qat, ppl_fp, strict=True))}
    row |= {"recovered": share.mean, "recovered_spread": share.spread}
    accuracies = mean(of("ours", "accuracy")), mean(float(own["accuracy"]) for own in full)
    row |= {"accuracy": accuracies[0], "accuracy_fp": accuracies[1]}
    for peer in _PEERS.get(scheme, {}):
        of_peer = recovered(ppl_ptq, of(peer), ppl_fp)
        row |= {"peer_name": peer, "ppl_peer": mean(of(peer)), "peer_recovered": of_peer.mean}
    return row


if __name__ == "__main__":
    main()
