"""Options that contradict each other, found out before anything is loaded."""

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from qat.errors import InputError

# What is compared inside of student and teacher, its weight, and the transforms after which it is not comparable.
_TERMS_AGAINST = {
    "hidden states": ("distill.hidden.weight", ("rotate",)),
    "queries, keys and values": ("distill.attention.weight", ("smoothquant", "awq")),
}


def check_choices(cfg: DictConfig) -> None:
    """Refuse options of several groups that do not go together, by the groups' chosen names.

    Raises:
        InputError: if so.
    """
    choices = HydraConfig.get().runtime.choices
    if choices.method == "fp" and choices.scheme != "none":
        raise InputError(
            f"method=fp trains without quantization, scheme={choices.scheme} with it: leave out one of them."
        )
    if choices.method == "grad_quant" and cfg.scheme.grad._target_.endswith("NoQuantizer"):
        raise InputError(
            f"method=grad_quant quantizes gradients, and scheme={choices.scheme} has no quantizer for them: add "
            "quantizer@scheme.grad=grad_token."
        )
    teaches = "_target_" in cfg.distill  # a recipe's options of it may be left
    if choices.method == "distill" and not teaches:
        raise InputError("method=distill needs something to aim at: leave out distill=none, or take method=qat.")
    if teaches and not cfg.fit:
        raise InputError(
            f"distill={choices.distill} is an objective of training, and method={choices.method} does not train: add "
            "distill=none, or take method=distill."
        )
    for term, (weight, kinds) in _TERMS_AGAINST.items():
        turned = [name for name in cfg.transforms if name in kinds]
        if OmegaConf.select(cfg, weight, default=0) and turned:
            raise InputError(
                f"transforms={choices.transforms} changes what {term} are in the student and not in its teacher, so "
                f"they cannot be compared: set {weight}=0, or transforms=calibrate."
            )
