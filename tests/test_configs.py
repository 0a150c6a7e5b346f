"""Every option of every config group composes, says how it is used, and builds what it names."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import OmegaConf, open_dict

CONFIGS = Path(__file__).parents[1] / "configs"
OPTIONS = sorted(path.relative_to(CONFIGS).with_suffix("") for path in CONFIGS.glob("*/*.yaml"))
REQUIRED = {
    "model/hf": ["model.name=x"],
    "data/text": ["data.path=x"],
    "data/generated": ["data.path=x"],
    "data/hub": ["data.name=x"],
}


def composed(tmp_path, *overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", [*overrides, f"hydra.runtime.output_dir={tmp_path}"], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    OmegaConf.resolve(cfg)
    return cfg


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_every_option_composes_and_instantiates(option, tmp_path):
    group, name = option.parent.name, option.name
    place = {"quantizer": "@scheme.weight", "kv": "@scheme.kv"}.get(group, "")
    override = f"{group}{place}={name}"
    cfg = composed(tmp_path, override, *REQUIRED.get(str(option), []), "paths.cache_dir=x")
    if group in ("model", "data"):
        return  # these read files and models; tests/lightning_modules and the README test run them
    if group == "module":
        instantiate(cfg.module, model=torch.nn.Linear(2, 2))
    elif group == "logger" and name == "wandb":
        instantiate(cfg.logger, offline=True)
    elif group in cfg and OmegaConf.is_config(cfg[group]):
        instantiate(cfg[group])
    else:
        instantiate(cfg.scheme)


def command_of(option):
    """The words of the command that a file starts with; two blanks end it."""
    first, second = (CONFIGS / option).with_suffix(".yaml").read_text().splitlines()[:2]
    line = second if first.startswith("# @package") else first
    assert line.startswith("# python train.py")
    return line.removeprefix("# python train.py").strip().partition("  ")[0]


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_every_option_starts_with_its_command(option):
    assert option.name in command_of(option) or option.name == "default"


def build_quantizers(cfg):
    """Make what the scheme says for a layer of 576 inputs and outputs and 32 tokens of heads of 64."""
    scheme = instantiate(cfg.scheme)
    made = {
        "weight": scheme.weight(shape=(576, 576)),
        "grad": scheme.grad(shape=(576,)),
        "input": scheme.input(shape=(576,)),
    }
    if scheme.kv is not None:
        made |= {
            role: factory(shape=(32, 64)) for role, factory in (("key", scheme.kv.key), ("value", scheme.kv.value))
        }
    return made


@pytest.mark.parametrize("option", [option for option in OPTIONS if option.parent.name == "quantizer"], ids=str)
def test_the_command_of_every_quantizer_makes_it(option, tmp_path):
    words = command_of(option).split()
    made = build_quantizers(composed(tmp_path, *words))
    (place,) = [word for word in words if word.endswith(f"={option.name}")]
    own = made[place.partition("=")[0].rpartition(".")[2]]
    expected = OmegaConf.load((CONFIGS / option).with_suffix(".yaml"))
    assert type(own).__name__ == expected._target_.rpartition(".")[2]
    if option.name[-1].isdigit():
        assert own.format.bits == int(option.name[-1])  # nf4 has four bits


def test_the_command_of_the_design_composes(tmp_path):
    overrides = ["method=qat", "scheme=w4a8", "quantizer@scheme.weight=kmeans", "scheme.weight.bits=3"]
    cfg = composed(tmp_path, *overrides)
    scheme = instantiate(cfg.scheme)
    assert scheme.weight.keywords["bits"] == 3
    assert scheme.weight.func.__name__ == "KMeansQuantizer"
    assert scheme.input.func.__name__ == "MinMaxQuantizer"


def test_rules_can_be_added_from_the_command_line(tmp_path):
    rule = ["+scheme.rules.down.match=*.down_proj", "+quantizer@scheme.rules.down.weight=minmax"]
    scheme = instantiate(composed(tmp_path, *rule, "scheme.rules.down.weight.bits=8").scheme)
    assigned = scheme.assign(["a.down_proj", "a.up_proj"])
    assert assigned["a.down_proj"].weight.keywords["bits"] == 8
    assert assigned["a.up_proj"].weight.func.__name__ == "LSQQuantizer"
