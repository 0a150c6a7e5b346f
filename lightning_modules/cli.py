"""The command line: Hydra's, with one clear line for a mistake, and a resume that repeats the run's own options."""

import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qat.errors import InputError, nearest
from qat.export.parity import GridContractError

_HERE = Path(__file__).parent


def config_dir() -> Path:
    """The configs: inside the package once installed, beside it in a checkout."""
    installed = _HERE / "configs"
    return installed if installed.is_dir() else _HERE.parent / "configs"


def main() -> None:
    """Entry point of `python train.py` and `qat-train`."""
    # Hydra then raises instead of printing and exiting, and `_explain` words the message.
    traceback_wanted = bool(os.environ.get("HYDRA_FULL_ERROR"))
    os.environ["HYDRA_FULL_ERROR"] = "1"
    _quiet()
    signal.signal(signal.SIGTERM, _raise_exit)
    try:
        sys.argv[1:] = resumed_arguments(sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="train")(_task)()
    except BaseException as error:
        message, code = _explain(error)
        if message is None or traceback_wanted:
            raise
        print(message, file=sys.stderr)
        raise SystemExit(code) from None


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
    rest = [argument for argument in arguments if not argument.startswith("resume=")]
    return [*own, *rest, f"hydra.run.dir='{folder}'", f"ckpt_path='{folder}/checkpoints/last.ckpt'"]


def _task(cfg: DictConfig) -> float | None:
    from lightning_modules.callbacks import Stopped
    from lightning_modules.pipeline import Job

    OmegaConf.resolve(cfg)
    try:
        rows = Job(cfg).run()
    except (Stopped, KeyboardInterrupt, SystemExit) as error:
        folder = Path(cfg.paths.output_dir).resolve()
        print(f"\n{error or 'Interrupted.'}\nResume with: {_program()} resume={folder}", flush=True)
        number = getattr(
            error, "signal_number", signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM
        )
        raise SystemExit(128 + number) from None
    return list(rows.values())[-1]["perplexity"]


def _program() -> str:
    name = Path(sys.argv[0]).name
    return f"python {sys.argv[0]}" if name.endswith(".py") else name


def _raise_exit(number: int, frame: Any) -> None:
    raise SystemExit("Terminated.")


def _explain(error: BaseException) -> tuple[str | None, int]:
    """What to print for `error`, None for a defect that deserves its traceback; and the exit code."""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        inner, code = _explain(error.__cause__)
        return inner or f"Error: {error}", code
    if isinstance(error, SystemExit | KeyboardInterrupt):
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 130
        return ("" if isinstance(error, SystemExit) and code == 0 else "Stopped."), code
    if isinstance(error, InputError | GridContractError):
        return f"Error: {error}", 1
    if isinstance(error, MissingConfigException):
        return f"Error: {_missing_config(error)}", 1
    if isinstance(error, ConfigCompositionException):
        return f"Error: {_composition(error)}", 1
    if isinstance(error, HydraException | OmegaConfBaseException):
        return f"Error: {error}", 1
    if isinstance(error, OSError) and error.filename:
        return f"Error: {error.strerror}: {error.filename}", 1
    return None, 1


def _missing_config(error: MissingConfigException) -> str:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    if error.options and group:
        return f"There is no option '{option}' in the group '{group}'.{nearest(option, error.options)}"
    return str(error)


def _composition(error: ConfigCompositionException) -> str:
    text = str(error).splitlines()[0]
    cause = error.__cause__
    key = getattr(cause, "key", None)
    parent = getattr(cause, "parent_node", None)
    if key is not None and isinstance(parent, DictConfig):
        full = getattr(cause, "full_key", key)
        return f"There is no option '{full}'.{nearest(str(key), [str(k) for k in parent])}"
    word = text.partition("'")[2].partition("'")[0]
    groups = [folder.name for folder in config_dir().iterdir() if folder.is_dir()]
    return f"{text}{nearest(word, groups)}" if word else text


def _quiet() -> None:
    """Drop notices about Lightning's and transformers' own internals."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for name in ("pytorch_lightning", "lightning.pytorch", "matplotlib", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for pattern in (
        ".*does not have many workers.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*Checkpoint directory.*",
    ):
        warnings.filterwarnings("ignore", pattern)
