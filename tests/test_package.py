"""What is installed: a light import, and a wheel that holds configs and text and runs from any folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_import_is_light():
    """Less of the processor than three tenths of what torch takes, in one of three, and without the heavy parts."""
    code = (
        "import sys, time; start = time.process_time(); import torch; torch_s = time.process_time() - start;"
        "import qat; seconds = time.process_time() - start - torch_s;"
        "heavy = {'transformers', 'pytorch_lightning', 'hydra', 'matplotlib', 'triton', 'accelerate', 'rich'};"
        "heavy &= set(sys.modules); assert not heavy, heavy; print(seconds / torch_s)"
    )
    command, options = [sys.executable, "-c", code], {"capture_output": True, "text": True, "check": True}
    assert any(float(subprocess.run(command, cwd=ROOT, **options).stdout) < 0.3 for _ in range(3))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        ".",
    ]
    subprocess.run(build, cwd=ROOT, check=True)
    (built,) = folder.glob("lightning_qat-*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_configs_and_text(wheel):
    configs = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")}
    shipped = {path.relative_to(wheel / "lightning_modules/configs") for path in wheel.rglob("*.yaml")}
    assert shipped == configs
    assert (wheel / "lightning_modules/data/text/factbook.train.txt").stat().st_size > 1_000_000
    commands = next(wheel.glob("*/entry_points.txt")).read_text()
    assert "qat-train = lightning_modules.cli:main" in commands
    assert "qat-plan = lightning_modules.plan:main" in commands
    assert "qat-tune = lightning_modules.tune:main" in commands
    assert "qat-synthesize = lightning_modules.synthesize:main" in commands
    assert {path.name for path in wheel.iterdir()} <= {"qat", "lightning_modules"} | {
        p.name for p in wheel.glob("*info")
    }


def test_the_installed_command_runs_from_any_folder(wheel, tmp_path, tiny_folder, text_file):
    options = ["model=hf", f"model.name={tiny_folder}", "data=text", f"data.path={text_file}", "debug=fast"]
    options += ["data.sequence_length=32", "scheme.weight.granularity=per_channel", "trainer.accelerator=cpu"]
    code = f"import sys; sys.path.insert(0, {str(wheel)!r}); from lightning_modules.cli import main; main()"
    environment = os.environ | {"QAT_CACHE": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-P", "-c", code, *options], cwd=tmp_path, env=environment, check=True)
    assert list(tmp_path.glob("outputs/*/native/quant_config.json"))
