"""The comparison of quantization without training: fair, resumable, and the same for every tool; on a toy."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import ptq, recipe, tables
from benchmarks.peers import check, ours
from benchmarks.peers import job as files
from tests.conftest import tiny_llama, tiny_tokenizer

PEER = "llmcompressor"
JOB = files.Job("inputs", "gptq", "int", 3, 64, True, 8, "cpu", {})


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """What runs `main` and returns its rows; models, texts and processes are replaced, and tools are noted in `ran`."""

    def load():
        torch.manual_seed(0)
        return tiny_llama(tie_word_embeddings=False).to(recipe.device())

    def windows(folder, length):
        return tuple(torch.randint(96, (12, 32), generator=torch.Generator().manual_seed(i)) for i in range(2))

    def run_tool(python, tool, job, folder):
        """A peer rounds, whatever the method."""
        ran.append((tool, job.method))
        (job if tool == ptq.OURS else replace(job, method="rtn-minmax")).write(folder)
        monkeypatch.setattr(sys, "argv", ["tool", str(folder)])
        ours.main()

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ptq", "--texts", ".", "--work", str(tmp_path / "work"), *arguments])
        ptq.main()
        return found["ptq"]

    found, ran = {}, []
    for name, value in {"load": load, "windows": windows, "run_tool": run_tool, "tokenizer": tiny_tokenizer}.items():
        monkeypatch.setattr(ptq, name, value)
    monkeypatch.setattr(ptq, "record", lambda name, command, rows: found.update({name: rows, "command": command}))
    run.ran, run.found, run.work = ran, found, tmp_path / "work"
    return run


def test_rows_of_all_tools(bench, capsys):
    rows = bench("--calibration", "8", "--peers", f"{PEER}={sys.executable}", "--schemes", "int3-g64", "kmeans3-row")
    assert bench.found["command"].endswith("--schemes int3-g64 kmeans3-row --peers llmcompressor=PYTHON")
    found = {(row["scheme"], row["method"], row["tool"]): row for row in rows}
    tools = [ptq.OURS, PEER, f"{PEER}-mse"]
    integers = [("rtn-minmax", ptq.OURS), ("rtn-lsq", ptq.OURS), *((m, t) for m in ("gptq", "awq") for t in tools)]
    if hasattr(ptq.transforms, "autoround"):
        integers.append(("autoround", ptq.OURS))
    codebooks = [("kmeans3-row", "rtn", ptq.OURS), ("kmeans3-row", "gptq", ptq.OURS)]
    assert list(found) == [("fp", "fp", "fp"), *(("int3-g64", *arm) for arm in integers), *codebooks]
    assert len({row["ppl_fp"] for row in rows}) == 1
    gptq, peer = found["int3-g64", "gptq", ptq.OURS], found["int3-g64", "gptq", PEER]
    assert gptq["peer_name"] in tools[1:]
    assert (gptq["peer_ppl"], gptq["ppl_fp"]) == (peer["ppl"], rows[0]["ppl"])
    assert peer["ppl"] == found["int3-g64", "rtn-minmax", ptq.OURS]["ppl"] != gptq["ppl"]
    assert peer["peer_name"] is None
    assert [found["int3-g64", method, ptq.OURS]["symmetric"] for method in ("gptq", "awq")] == [True, False]
    assert found[codebooks[0]]["symmetric"] is None
    assert all(row["seconds"] > 0 and row["versions"]["torch"] for row in rows[1:])
    assert "left out: int3-g64@gptq@gptqmodel: give --peers gptqmodel=PYTHON" in capsys.readouterr().out
    table = tables.ptq(rows).splitlines()
    assert len(table) == len(rows) + 2
    assert len({line.count("|") for line in table}) == 1
    assert "| int3-g64 | awq | ours | asymmetric |" in "\n".join(table)


def test_a_run_that_stopped_goes_on(bench, monkeypatch):
    arguments = ["--calibration", "4", "--schemes", "int4-g64", "--methods", "rtn-minmax", "gptq"]
    evaluate = ptq.perplexity
    monkeypatch.setattr(ptq, "perplexity", lambda model, val: stop() if len(bench.ran) == 2 else evaluate(model, val))
    with pytest.raises(KeyboardInterrupt):
        bench(*arguments)
    assert bench.ran == [("ours", "rtn-minmax"), ("ours", "gptq")]
    monkeypatch.setattr(ptq, "perplexity", evaluate)
    rows = bench(*arguments)
    assert len(bench.ran) == 2  # what GPTQ had left was evaluated, and nothing was quantized again
    monkeypatch.setattr(ptq, "perplexity", None)
    assert bench(*arguments) == rows
    assert not list(bench.work.rglob(files.WEIGHTS))  # they are as large as the model, and there are many
    monkeypatch.setattr(ptq, "perplexity", evaluate)
    bench("--calibration", "5", *arguments[2:])
    assert len(bench.ran) == 4  # other windows are other arms


def test_the_least_seconds_of_repeats_count(bench, monkeypatch):
    arguments = ["--calibration", "4", "--schemes", "int4-g64", "--methods", "rtn-minmax", "--repeats", "3"]
    row = bench(*arguments)[1]
    seconds = [json.loads(path.read_text())["seconds"] for path in bench.work.rglob(files.RESULT)]
    assert len(bench.ran) == len(set(seconds)) == row["repeats"] == 3
    assert row["seconds"] == min(seconds)


def stop():
    raise KeyboardInterrupt


def test_a_tool_is_a_process_of_its_own(tmp_path):
    """A fake interpreter notes how it was called, and that nothing of an earlier attempt was left."""
    python = fake(
        tmp_path,
        f'ls > seen; echo "$@" >> seen; {sys.executable} -c "import benchmarks" || exit 1; echo 1 > {files.RESULT}',
    )
    folder = tmp_path / "arm"
    folder.mkdir()
    (folder / files.WEIGHTS).write_text("of a run that was killed")
    ptq.run_tool(python, PEER, JOB, folder)
    assert (folder / "seen").read_text().split() == [
        files.JOB, "log.txt", "seen", "-m", f"benchmarks.peers.{PEER}", str(folder)
    ]  # fmt: skip
    assert files.Job(**json.loads((folder / files.JOB).read_text())) == JOB


@pytest.mark.parametrize(
    "script", ["echo no such module; exit 3", "echo no such module"], ids=["fails", "leaves nothing"]
)
def test_a_tool_that_fails_shows_why(tmp_path, script):
    with pytest.raises(SystemExit, match=r"llmcompressor stopped with code (3|0).*\n.*no such module"):
        ptq.run_tool(fake(tmp_path, script), PEER, JOB, tmp_path / "arm")


def fake(folder, script):
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [("hqq=python", "there is no tool 'hqq'"), (f"{PEER}=/nowhere/python", "no interpreter there"), (PEER, "give")],
)
def test_interpreters_that_are_not_there_are_refused(entry, message):
    with pytest.raises(SystemExit, match=message):
        ptq.interpreters([entry])


@pytest.fixture
def rounded():
    """A model, and its linear layers on 8 values a group of 64."""
    model = tiny_llama(tie_word_embeddings=False)
    layers = files.linear_layers(model)
    return model, {f"{n}.weight": torch.randint(-4, 4, m.weight.shape) * 0.25 for n, m in layers.items()}


def test_weights_on_their_grid_pass(rounded):
    model, weights = rounded
    assert len(weights) == 14
    norm = "model.norm.weight"
    check.check_weights("arm", weights | {norm: torch.ones(64)}, model, bits=3, group_size=64)
    check.check_weights("arm", weights, model, bits=3, group_size=0)


BLOCK = "model.layers.1.mlp.down_proj.weight"
UNFAIR = {
    "a layer left out": (lambda w: w.pop(BLOCK), "1 layers are not quantized"),
    "a ninth value": (lambda w: w[BLOCK][5, 70:72].copy_(torch.tensor([9.0, 9.5])), "8 is the most"),
    "the embedding": (lambda w: w.update({"model.embed_tokens.weight": torch.zeros(96, 64)}), "stays as it is"),
    "the head": (lambda w: w.update({"lm_head.weight": torch.zeros(96, 64)}), "stays as it is"),
    "another shape": (lambda w: w.update({BLOCK: w[BLOCK].T}), "no such tensor"),
    "another name": (lambda w: w.update({"layers.0.weight": torch.zeros(2)}), "no such tensor"),
    "NaN": (lambda w: w[BLOCK][0, 0].fill_(torch.nan), "NaN"),
}


@pytest.mark.parametrize(("change", "message"), UNFAIR.values(), ids=UNFAIR)
def test_weights_that_are_not_fair_are_refused(rounded, change, message):
    model, weights = rounded
    change(weights)
    with pytest.raises(SystemExit, match=message):
        check.check_weights("arm", weights, model, bits=3, group_size=64)


def test_values_are_counted_by_group():
    weight = torch.tensor([[0.0, -0.0, 1.0, 2.0], [3.0, 3.0, 4.0, 4.0]])
    assert check.most_values(weight, 2) == 2
    assert check.most_values(weight, 0) == 3


def test_a_loss_that_differs_is_refused():
    check.check_loss("arm", 4.0, 4.1)
    for found in (4.2, 3.8, float("nan")):
        with pytest.raises(SystemExit, match="misread"):
            check.check_loss("arm", 4.0, found)


def test_ours_leaves_what_the_quantized_model_computes(tmp_path, monkeypatch):
    """AWQ moves scales into norms, so these come along; what does not change, does not."""
    model = tiny_llama(tie_word_embeddings=False)
    windows = torch.randint(96, (8, 32))
    model.save_pretrained(tmp_path / "inputs" / files.MODEL)
    files.save_file({"input_ids": windows}, tmp_path / "inputs" / files.CALIBRATION)
    replace(JOB, inputs=str(tmp_path / "inputs"), method="awq", symmetric=False).write(tmp_path / "arm")
    monkeypatch.setattr(sys, "argv", ["ours", str(tmp_path / "arm")])
    ours.main()
    weights = load_file(tmp_path / "arm" / files.WEIGHTS)
    result = json.loads((tmp_path / "arm" / files.RESULT).read_text())
    assert not {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} & set(weights)
    assert "model.layers.0.input_layernorm.weight" in weights
    check.check_weights("awq", weights, model, 3, 64)
    before = files.loss(model, windows, "cpu")
    model.load_state_dict(weights, strict=False)
    assert files.loss(model, windows, "cpu") == pytest.approx(result["loss"], rel=1e-6)
    assert before != pytest.approx(result["loss"], rel=1e-6)
