"""Running every arm of a comparison, one after the other, each once."""

import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console

from lightning_modules.choices import check_choices
from lightning_modules.comparison.arms import FULL, Arm, chosen, full_precision, rounded_arms, trained_arms
from lightning_modules.comparison.outcome import Outcome, table_of, verdict
from lightning_modules.comparison.peers import PEERS, installed
from lightning_modules.comparison.picture import draw
from lightning_modules.comparison.recipe import spelled_out
from lightning_modules.pipeline import FULL as BEFORE
from lightning_modules.pipeline import Job
from qat.atomic import replaced_file
from qat.errors import InputError, nearest

_PLAIN = "pretrained"


class Comparison:
    """`method=compare`: for every seed a run in full precision, roundings of it, and runs that train quantized.

    What an arm found is kept in `comparison.json` as soon as it is there; a comparison that was stopped goes on with
    the arm that it was at, from that arm's last checkpoint.

    Args:
        cfg: the composed options; `cfg.compare` names the seeds and the arms.
        given: the options as they were given, which every arm gets too.

    Raises:
        InputError: if there is nothing to compare.
    """

    def __init__(self, cfg: DictConfig, given: Sequence[str]) -> None:
        self._given, self._spelled_out, self._options = list(given), spelled_out(given), cfg.compare
        self._folder, self._title = Path(cfg.paths.output_dir), str(cfg.title)
        self._console = Console()
        _check(cfg)
        self._scheme, self._peers = cfg.scheme, [name for name in cfg.compare.peers if installed(name)]
        self._found: dict[str, dict[str, Any]] = {}
        if cfg.resumed and self._path.is_file():
            self._found = json.loads(self._path.read_text())["arms"]

    def run(self) -> float:
        """The mean perplexity of the first trained arm, which is what a sweeper minimises."""
        seeds = list(self._options.seeds)
        self._try_arms(seeds[0])
        for seed in seeds:
            self._run_seed(seed)
        outcome = self._outcome(seeds)
        for name in [*chosen(self._options.rounded), *self._peers]:
            if refused := self._refusal(name):
                self._say(f"{name} was left out: {refused}")
        self._console.print(table_of(outcome, f"{self._title}, {len(seeds)} seed{'s' * (len(seeds) > 1)}"))
        for name in outcome.trained:
            self._say(verdict(outcome, name))
        self._say(f"picture: {draw(outcome, self._folder / 'comparison.png', self._title)}")
        values = next(iter(outcome.trained.values()))
        return sum(values) / len(values)

    @property
    def _path(self) -> Path:
        return self._folder / "comparison.json"

    def _try_arms(self, seed: int) -> None:
        """Compose every arm, so that a mistake in the last one is found before the first one runs."""
        for arm in [full_precision(self._spelled_out, seed), *self._later_arms(seed, ["model=hf", "model.name=later"])]:
            with composed(arm.options):
                pass

    def refuse_changes(self) -> None:
        """Refuse to go on with other options than those of the runs that are done.

        Raises:
            InputError: if so.
        """
        for seed in self._options.seeds:
            full = full_precision(self._spelled_out, seed)
            if _key(full, seed) not in self._found:
                continue
            for arm in [full, *self._later_arms(seed, self._loading(full, seed))]:
                key = _key(arm, seed)
                before = self._found.get(key, {}).get("options", arm.options)
                if before != arm.options:
                    changed = ", ".join(sorted(set(before) ^ set(arm.options)))
                    raise InputError(
                        f"The run {key} was done with other options ({changed}): resume without changing them, or "
                        "choose another hydra.run.dir."
                    )

    def _run_seed(self, seed: int) -> None:
        full = full_precision(self._spelled_out, seed)
        self._run_arm(full, seed)
        for arm in self._later_arms(seed, self._loading(full, seed)):
            self._run_arm(arm, seed)

    def _later_arms(self, seed: int, model: Sequence[str]) -> list[Arm]:
        """All but the run in full precision, which the options `model` load."""
        rounded = rounded_arms(self._spelled_out, self._options.rounded, seed, model)
        peers = [Arm(name, full_precision(self._spelled_out, seed).options) for name in self._peers]
        return rounded + trained_arms(self._given, self._options.trained, seed) + peers

    def _loading(self, full: Arm, seed: int) -> list[str]:
        """The options that load what the run in full precision left."""
        attention = self._found[_key(full, seed)]["attention"]
        dtype = [option for option in full.options if option.startswith("model.dtype=")]
        return [
            "model=hf",
            f"model.name='{self._folder_of(full, seed) / _PLAIN}'",
            f"model.attention={attention}",
            *dtype,
        ]

    def _folder_of(self, arm: Arm, seed: int) -> Path:
        return self._folder / _key(arm, seed)

    def _run_arm(self, arm: Arm, seed: int) -> None:
        """Run `arm`, unless that was done."""
        if _key(arm, seed) in self._found:
            return
        folder = self._folder_of(arm, seed)
        self._say(f"--- {arm.name}, seed {seed}")
        try:
            figures = self._figures(arm, folder)
        except InputError as error:
            if arm.name not in [*chosen(self._options.rounded), *self._peers]:
                raise
            figures = {"refused": str(error)}
        gc.collect()
        self._keep(_key(arm, seed), figures | {"options": arm.options})

    def _figures(self, arm: Arm, folder: Path) -> dict[str, Any]:
        """What running `arm` found."""
        with composed([*arm.options, *_resuming(folder)]) as cfg:
            job = PEERS[arm.name](cfg, instantiate(self._scheme)) if arm.name in self._peers else Job(cfg)
            rows = job.run()
            if arm.name == FULL:
                job.save_plain(folder / _PLAIN)
            attention = job.model.config._attn_implementation
        last = list(rows.values())[-1]["perplexity"]
        return {"perplexity": last, "before": rows[BEFORE]["perplexity"], "attention": attention}

    def _keep(self, key: str, figures: dict[str, Any]) -> None:
        self._found[key] = figures
        with replaced_file(self._path) as temporary:
            temporary.write_text(json.dumps({"title": self._title, "arms": self._found}, indent=1) + "\n")

    def _outcome(self, seeds: Sequence[int]) -> Outcome:
        def of(name: str, figure: str = "perplexity") -> list[float]:
            return [self._found[f"{name}-{seed}"][figure] for seed in seeds]

        rounded, trained = chosen(self._options.rounded), [*chosen(self._options.trained), *self._peers]
        parts = ({name: of(name) for name in names if not self._refusal(name)} for names in (rounded, trained))
        return Outcome(of(FULL, "before"), of(FULL), *parts)

    def _refusal(self, name: str) -> str | None:
        """Why the arm could not do what the scheme asks for: AutoRound of pairs, or a peer without that grid."""
        found = (self._found[f"{name}-{seed}"].get("refused") for seed in self._options.seeds)
        return next(filter(None, found), None)

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)


def _key(arm: Arm, seed: int) -> str:
    return f"{arm.name}-{seed}"


@contextmanager
def composed(options: Sequence[str]) -> Iterator[DictConfig]:
    """What `options` compose, as if they had been given on the command line."""
    own = HydraConfig.instance().cfg
    cfg = compose("train", list(options), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    try:
        with open_dict(cfg):
            del cfg["hydra"]
        check_choices(cfg)
        OmegaConf.resolve(cfg)
        yield cfg
    finally:
        HydraConfig.instance().cfg = own


def _resuming(folder: Path) -> list[str]:
    """Options for a run in `folder`, which goes on where it was stopped there."""
    checkpoint = folder / "checkpoints" / "last.ckpt"
    found = [f"ckpt_path='{checkpoint}'"] if checkpoint.is_file() else []
    return [f"paths.output_dir='{folder}'", "resumed=true", *found]


def _check(cfg: DictConfig) -> None:
    options = cfg.compare
    seeds = OmegaConf.to_container(options.seeds) if OmegaConf.is_list(options.seeds) else options.seeds
    whole = isinstance(seeds, list) and all(isinstance(seed, int) and seed >= 0 for seed in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"compare.seeds is {seeds}: it is a list of different whole numbers, [0,1,2].")
    if not chosen(options.trained):
        raise InputError("compare.trained has no arm: add 'compare.trained.qat=[\"method=qat\"]'.")
    for name in options.peers:
        if name not in PEERS:
            raise InputError(f"compare.peers has '{name}'.{nearest(str(name), PEERS)}")
    names = [*chosen(options.trained), *chosen(options.rounded), *options.peers]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise InputError(f"Two arms are called '{min(twice)}': rename one of them.")
    if cfg.trainer.devices not in (1, "1"):
        raise InputError(f"trainer.devices is {cfg.trainer.devices}; the runs of a comparison have one device each.")
