"""The command line: Hydra's, with one clear line for a mistake, and a resume that repeats the run's own options."""

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_modules.signals import exit_on_signals
from qat.atomic import replaced_file
from qat.errors import InputError, nearest
from qat.export.parity import GridContractError
from qat.kernels.quantized_linear import fallback

_HERE = Path(__file__).parent
# Groups that are chosen for a place in the scheme.
_PLACED = {
    "quantizer": "quantizer@scheme.weight=kmeans (or @scheme.input, .output, .grad, .kv.key, .kv.value)",
    "kv": "kv@scheme.kv=kivi",
}
Result = TypeVar("Result")


def config_dir() -> Path:
    """The configs: inside the package once installed, beside it in a checkout."""
    installed = _HERE / "configs"
    return installed if installed.is_dir() else _HERE.parent / "configs"


def main() -> None:
    """Entry point of `python train.py` and `qat-train`."""
    quiet()
    exit_on_signals()
    reporting(_train)


def command(config: str, run: Callable[[DictConfig], None]) -> None:
    """Entry point of a command beside training: `run` gets what `configs/<config>.yaml` and the arguments compose."""

    def task(cfg: DictConfig) -> None:
        reporting(lambda: run(cfg))

    quiet()
    exit_on_signals()
    reporting(lambda: _compose(config, task))


def _train() -> None:
    # A run multiplies by packed weights only to compare them; how fast that is matters to who serves them.
    logging.getLogger(fallback.__name__).setLevel(logging.ERROR)
    sys.argv[1:] = _flags_first(resumed_arguments(sys.argv[1:]))
    _compose("train", _task)


def _compose(config: str, task: Callable[[DictConfig], Any]) -> None:
    # Hydra then raises what goes wrong while composing, instead of printing it, and `_explain` words the message.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=config)(task)()


def _flags_first(arguments: list[str]) -> list[str]:
    """Hydra takes `-m` before the overrides only."""
    flags = [argument for argument in arguments if argument in ("-m", "--multirun")]
    return [*flags, *(argument for argument in arguments if argument not in flags)]


def reporting(work: Callable[[], Result]) -> Result:
    """Do `work`; print a mistake as one line and exit. A defect keeps its traceback; QAT_TRACEBACK=1 keeps them all."""
    try:
        return work()
    except Exception as error:
        message = _explain(error)
        if message is None or os.environ.get("QAT_TRACEBACK"):
            raise
        print(f"Error: {message}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


def resumed_arguments(arguments: list[str]) -> list[str]:
    """Replace `resume=RUN_FOLDER` by that run's own options, its folder and its checkpoint.

    Raises:
        InputError: if the folder is not that of a run.
    """
    given = [argument.partition("=")[2] for argument in arguments if argument.startswith("resume=")]
    if not given:
        return arguments
    folder = Path(given[-1]).expanduser().resolve()
    recorded = folder / ".hydra" / "overrides.yaml"
    if not recorded.is_file():
        raise InputError(f"{folder} is not the folder of a run: it has no .hydra/overrides.yaml.")
    own = [str(override) for override in OmegaConf.load(recorded)]
    runtime = OmegaConf.load(folder / ".hydra" / "hydra.yaml").hydra.runtime
    added = [f"--config-dir={s.path}" for s in runtime.config_sources if s.provider == "command-line"]
    if Path(runtime.cwd).is_dir():
        os.chdir(runtime.cwd)  # its relative paths mean the same as then
    rest = [argument for argument in arguments if not argument.startswith("resume=")]
    # Where another option of a group is chosen now, what was said of the former one no longer holds.
    anew = tuple(f"{argument.partition('=')[0]}." for argument in rest)
    own = [override for override in own if not override.lstrip("+~").startswith(anew)]
    written = [o.partition("=")[2] for o in own if o.startswith("paths.output_dir=")]
    checkpoint = Path(*written[-1:] or [folder]).absolute() / "checkpoints" / "last.ckpt"
    # A run that was killed before its first checkpoint starts again.
    found = [f"ckpt_path='{checkpoint}'"] if checkpoint.is_file() else []
    return [*added, *own, *rest, f"hydra.run.dir='{folder}'", "resumed=true", *found]


def _task(cfg: DictConfig) -> float:
    # Reported in here already: an exception that leaves the task makes Hydra print a report of its own.
    if not os.environ.get("LOCAL_RANK", "0").strip("0"):  # the other processes of a run have its folder too
        reporting(lambda: _refuse_changes(cfg))
        reporting(lambda: _claim(cfg))
    return reporting(lambda: _run(cfg))


def _refuse_changes(cfg: DictConfig) -> None:
    """Refuse a comparison that goes on with other options, before they are written to its folder."""
    if cfg.resumed and cfg.get("compare"):
        _comparison(cfg).refuse_changes()


def _comparison(cfg: DictConfig) -> Any:
    from lightning_modules.comparison import Comparison

    return Comparison(cfg, HydraConfig.get().overrides.task)


def _claim(cfg: DictConfig) -> None:
    """Take the run's folder, and write there what Hydra would have: the options, so that the run can be resumed.

    Hydra itself writes over what another run left, or is writing.
    """
    run = HydraConfig.get()
    folder = Path(run.runtime.output_dir)
    try:
        (folder / ".hydra").mkdir(parents=True, exist_ok=cfg.resumed)
    except FileExistsError:
        raise InputError(
            f"{folder} holds another run: go on with it by resume={folder}, or choose another hydra.run.dir."
        ) from None
    for name, content in (("overrides", run.overrides.task), ("hydra", {"hydra": run}), ("config", cfg)):
        with replaced_file(folder / ".hydra" / f"{name}.yaml") as temporary:
            OmegaConf.save(OmegaConf.create(content), temporary)


def _run(cfg: DictConfig) -> float:
    """The perplexity of the last row, which is what a sweeper minimises."""
    try:
        return _job(cfg)
    except SystemExit:
        resume = shlex.quote(f"resume={HydraConfig.get().runtime.output_dir}")
        print(f"\nResume with: {program()} {resume}", flush=True)
        raise


def _job(cfg: DictConfig) -> float:
    from lightning_modules.callbacks import Stopped
    from lightning_modules.choices import check_choices
    from lightning_modules.pipeline import Job

    # Only now: Lightning sets its level as it is imported.
    for name in ("pytorch_lightning", "lightning_fabric", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    check_choices(cfg)
    OmegaConf.resolve(cfg)
    try:
        if cfg.get("compare"):
            return float(_comparison(cfg).run())
        rows = Job(cfg).run()
    except Stopped as stopped:
        print(f"\n{stopped}", flush=True)
        raise SystemExit(128 + stopped.signal_number) from None
    return float(list(rows.values())[-1]["perplexity"])


def program() -> str:
    """How the user called this."""
    return f"python {sys.argv[0]}" if sys.argv[0].endswith(".py") else Path(sys.argv[0]).name


def _explain(error: BaseException) -> str | None:
    """What to say of a mistake in the input; None for a defect of this program."""
    if isinstance(error, InstantiationException):
        return (error.__cause__ and _explain(error.__cause__)) or _instantiation(error)
    if isinstance(error, MissingConfigException):
        return _missing_config(error)
    if isinstance(error, OverrideParseException):
        return f"'{error.override}' cannot be read: a text with quotes, commas or brackets needs quotes of its own."
    if isinstance(error, ConfigCompositionException):
        return _composition(error)
    if isinstance(error, OSError):
        return f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    if type(error).__module__.startswith("wandb"):
        return f"Weights & Biases: {error} Log in with `wandb login`, or set logger.offline=true."
    if isinstance(error, InputError | GridContractError | HydraException | OmegaConfBaseException):
        return str(error)
    return None


def _instantiation(error: InstantiationException) -> str:
    """Which part of the configuration was refused, and why, on one line."""
    key = str(error).rpartition("full_key: ")[2]
    cause = error.__cause__
    reason = str(error).splitlines()[0] if cause is None else f"{type(cause).__name__}: {cause}"
    return f"The options of '{key}' were refused: {' '.join(reason.split())}"


def _missing_config(error: MissingConfigException) -> str:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    if error.options and group:
        return f"There is no option '{option}' in the group '{group}'.{nearest(option, error.options)}"
    return str(error)


def _composition(error: ConfigCompositionException) -> str:
    text = str(error).splitlines()[0]
    if text.startswith("Ambiguous value"):
        key, _, value = text.partition("'")[2].rpartition("'")[0].partition("=")
        return f"A value with commas needs quotes of its own: '{key}=\"{value}\"'; with -m it is a list of values."
    cause = error.__cause__
    key = getattr(cause, "key", None)
    parent = getattr(cause, "parent_node", None)
    if key is not None and isinstance(parent, DictConfig):
        full = getattr(cause, "full_key", key)
        return f"There is no option '{full}'.{nearest(str(key), [str(k) for k in parent])}"
    word = text.partition("'")[2].partition("'")[0]
    for group, place in _PLACED.items():
        if word.partition("@")[0] == group:
            return f"The group '{group}' has a place: write {place}."
    groups = [folder.name for folder in config_dir().iterdir() if folder.is_dir()]
    return f"{text}{nearest(word, groups)}" if word else text


def quiet() -> None:
    """Drop notices about the internals of Lightning, transformers, and what these import where it is installed."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for pattern in (
        ".*does not have many workers.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*Checkpoint directory.*",
        ".*resuming from a checkpoint that ended before the epoch ended.*",
        ".*all_gather is deprecated.*",
        ".*sync_dist=True.*",
        ".*Dynamo detected a call to a `functools.lru_cache`.*",
    ):
        warnings.filterwarnings("ignore", pattern)
