"""What is said of claims follows from the result files, and from nothing else."""

import json

import pytest

from benchmarks import claims, tables
from benchmarks.claims import CLAIMS, adapter_share, answer, answers

GRIDS = [
    {"grid": "int4-g64", "bits_per_weight": 4.25, "ppl_fp": 18.0, "ppl_rtn": 19.0, "ppl_qat": 18.5},
    {"grid": "kmeans4-row", "bits_per_weight": 4.4, "ppl_fp": 18.0, "ppl_rtn": 19.0, "ppl_qat": 18.1},
    {"grid": "int8-row", "bits_per_weight": 8.02, "ppl_fp": 18.0, "ppl_rtn": 18.05, "ppl_qat": 18.04},
]
DENSE = {"arm": "gptq-int4-g128", "removed": 0.0, "layers": 40, "layers_done": 2, "bf16_bytes": 26e9, "bytes": 7.2e9}
PRUNED = DENSE | {"arm": "structured-0.8-gptq-int4-g128", "removed": 0.8, "bytes": 2.0e9}
DECODE = {"model": "13b", "format": "int4-g64", "batch": 1, "speedup": 3.4}
MIXED = {"bits_per_weight": 3.25, "ppl_mixed": 24.0, "larger": "int5-g64", "larger_bits_per_weight": 5.25}
PTQ = {"tool": "ours", "method": "gptq", "scheme": "int4-g64", "ppl": 18.1, "ppl_fp": 18.0}
# What a claim is about, the rows of its file, and what then follows; changed as the last says, the contrary does.
CASES = {
    "75 %": (GRIDS, {"bits_per_weight": 5.0}, "73.4%"),
    "26 GB": ([DENSE, PRUNED], {"bytes": 9e9}, "26.0 GB to 7.2 GB, 3.6x, from 2 of 40 layers"),
    "4.8 GB": ([DENSE, PRUNED], {"bytes": 4e9}, "13.0x"),
    "3x": ([DECODE], {"speedup": 2.0}, "3.4x (int4-g64)"),
    "5x": ([DECODE | {"model": "13b-structured", "speedup": 6.0}], {"speedup": 3.0}, "6.0x"),
    "with training": (GRIDS, {"ppl_qat": 20.0}, "perplexity +0.6%"),
    "without training": ([PTQ], {"ppl": 20.0}, "perplexity +0.6%"),
    "k-means)": (GRIDS, {"ppl_qat": 20.0, "ppl_rtn": 18.0}, "18.10 (kmeans4-row) against 18.04 (int8-row)"),
    "40 %": ([MIXED | {"ppl_larger": 24.1}], {"ppl_larger": 20.0}, "against 24.10 (int5-g64), 38% saved"),
    "fine-tunes 65B": ([{"model": "65b", "arm": "ours", "peak_gib": 39.0}], {"peak_gib": 46.0}, "41.9 GB"),
}


def named(word):
    (found,) = [claim for claim in CLAIMS if f"{word} " in f"{claim.text} ".replace(",", " ")]
    return found


@pytest.mark.parametrize("word", CASES)
def test_an_answer_follows_from_the_rows(word, tmp_path, monkeypatch):
    rows, change, figure = CASES[word]
    claim = named(word)
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    assert answer(claim).verdict == "not measured yet"
    path = tmp_path / f"{claim.source}.json"
    for own, verdict in ((rows, "confirmed"), ([row | change for row in rows], "refuted")):
        path.write_text(json.dumps({"command": "python -m benchmarks.x", "rows": own}))
        found = answer(claim)
        assert found.verdict == verdict
        assert (figure in found.figure) == (verdict == "confirmed")
        assert found.origin == f"`{path.name}`: `python -m benchmarks.x`"
    path.write_text(json.dumps({"command": "", "rows": []}))
    assert answer(claim).verdict == "not measured yet"


def test_every_claim_has_a_row_with_an_answer():
    table = tables.claims(answers()).splitlines()
    assert len(table) == 2 + len(CLAIMS)
    verdicts = {own.verdict for own in answers()}
    assert verdicts <= {"confirmed", "refuted", "untestable here", "not measured yet"}
    assert all(own.figure for own in answers() if own.verdict != "not measured yet")
    assert all(own.origin for own in answers() if own.verdict != "untestable here")


def test_the_share_of_adapters_is_that_of_peft():
    from peft import LoraConfig, get_peft_model

    from tests.conftest import tiny_llama

    model = get_peft_model(
        tiny_llama(tie_word_embeddings=False), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    trainable, total = model.get_nb_trainable_parameters()
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert adapter_share(4, 64, 128, 2, 4, 2, 16, 96) == pytest.approx(trainable / (total - trainable - norms))
