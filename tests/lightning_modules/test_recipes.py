"""Every recipe of configs/experiment trains, and ships what it trained."""

import re
from pathlib import Path

import pytest
from hydra import initialize_config_dir

from lightning_modules.comparison.run import composed
from lightning_modules.pipeline import SHIPPED, TRAINED, Job

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_trains_and_ships(recipe, tmp_path, tiny_folder, text_file):
    options = [f"experiment={recipe}", "model=hf", f"model.name={tiny_folder}", "data=text", f"data.path={text_file}"]
    options += ["data.sequence_length=32", "data.batch_size=2", "data.val_windows=2", "calibration_batches=2"]
    options += ["trainer.max_steps=2", "trainer.accelerator=cpu", "threads=1", "resumed=true"]
    options += [f"paths.output_dir={tmp_path}", f"paths.cache_dir={tmp_path}"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        warm = "reconstruct" in (CONFIGS / "experiment" / f"{recipe}.yaml").read_text()
        with composed([*options, *(["transforms.reconstruct.steps=2"] if warm else [])]) as cfg:
            rows = Job(cfg).run()
    assert rows[SHIPPED]["perplexity"] == pytest.approx(rows[TRAINED]["perplexity"], rel=1e-6)
    assert ("quantized by reconstruct" in rows) == warm
    bits = {"nested": 8, "ternary": 2}.get(recipe) or int(re.search(r"\d", recipe)[0])
    table = 16 * 2**bits / 64 if recipe.startswith("kmeans") else 0.0  # rows of the toy have 64 weights and more
    assert bits < rows[SHIPPED]["bits_per_weight"] <= bits + table + 0.6
