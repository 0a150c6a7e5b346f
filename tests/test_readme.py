"""The README is true: its Python runs, its commands compose, its tables are those of the result files."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from benchmarks.tables import filled, pages
from tests.test_configs import build_quantizers

ROOT = Path(__file__).parents[1]
NAMES = (
    "schemes",
    "quantizers",
    "pruning",
    "training",
    "dynamics",
    "export",
    "distillation",
    "evaluation",
    "inference",
    "comparison",
    "recipes",
)
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in NAMES)]
# Its `python train.py` needs the scheme that the command before it wrote.
PLANNING = ROOT / "docs" / "mixed_precision.md"


def commands():
    """Every `python train.py ...` of the documentation and of the configs' first lines."""
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        yield from re.findall(r"python train\.py[^`\n#]*", text)
    for file in (ROOT / "configs").glob("*/*.yaml"):
        header = "\n".join(file.read_text().splitlines()[:2])
        yield from (found.partition("    ")[0] for found in re.findall(r"# (python train\.py.*)", header))


def overrides(command):
    words = shlex.split(command)[2:]
    return [
        word if "=[" in word or "={" in word else word.partition(",")[0] for word in words if not word.startswith("-")
    ]


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_every_command_composes(command):
    given = [word for word in overrides(command) if not word.startswith("resume=") and word != "..."]
    known = [word for word in given if not word.startswith("experiment=mine")]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        build_quantizers(compose("train", known))


def other_commands():
    """Every `python -m lightning_modules.NAME ...`; NAME is that of its configuration too."""
    for page in [*PAGES, PLANNING]:
        yield from re.findall(r"python -m lightning_modules\.(\w+)([^`\n#]*)", page.read_text().replace("\\\n", " "))


@pytest.mark.parametrize(("name", "words"), sorted(set(other_commands())))
def test_every_other_command_composes(name, words):
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        compose(name, [word for word in shlex.split(words) if not word.startswith("-")])


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 2
    exec("\n".join(blocks), {})
    assert (tmp_path / "artifact" / "quant_config.json").is_file()


def test_the_tables_are_those_of_the_results():
    for page in pages():
        assert filled(page.read_text()) == page.read_text(), page


def test_links_lead_somewhere():
    for page in [*PAGES, PLANNING, ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.md"]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
