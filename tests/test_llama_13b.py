"""The benchmark of the 13B shape, on a toy."""

import argparse
import json
import sys

import pytest

from benchmarks import llama_13b
from benchmarks.llama_13b import Arm, measure

WHOLE = {"group": 128, "structured": 0.0, "layers": 3, "windows": 4, "length": 32, "tiny": True}


def test_the_size_of_the_model_follows_from_one_of_its_layers():
    whole, one = measure(Arm(**WHOLE)), measure(Arm(**(WHOLE | {"layers": 1})))
    assert whole["bytes"] == whole["bytes_measured"]
    assert one["bytes"] == pytest.approx(whole["bytes"], rel=2e-3)
    assert one["bf16_bytes"] == whole["bf16_bytes"]
    assert one["seconds"] == pytest.approx(3 * one["seconds_measured"])
    assert (whole["bits_per_weight"], whole["removed"]) == (4.125, 0)


def test_parts_are_removed_before():
    row = measure(Arm(**(WHOLE | {"structured": 0.8, "layers": 2})))
    assert row["removed"] == pytest.approx(0.8, abs=0.01)
    assert row["bf16_bytes"] > 10 * row["bytes"]


def test_a_run_that_stopped_measures_no_row_again(monkeypatch, tmp_path, capsys):
    measured = []

    def process(command, **_):
        arm = Arm(**json.loads(command[-1]))
        measured.append(arm.name)
        return argparse.Namespace(stdout=json.dumps({"arm": arm.name}))

    monkeypatch.setattr(llama_13b.subprocess, "run", process)
    for extra in ([], ["--structured", "0.8"]):
        monkeypatch.setattr(sys, "argv", ["llama_13b", "--tiny", "--work", str(tmp_path), *extra])
        llama_13b.main()
    assert measured == ["gptq-int4-g128", "gptq-int4-g64", "structured-0.8-gptq-int4-g128"]
