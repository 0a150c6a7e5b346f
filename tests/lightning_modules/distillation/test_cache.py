"""The teacher's logits on disk teach what the teacher itself does, and are computed once."""

import json
import pickle
from contextlib import nullcontext
from functools import partial
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

import qat
from lightning_modules import fingerprint
from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.data import HubDataModule, TextDataModule
from lightning_modules.data.windows import WindowStream
from lightning_modules.distillation import Distillation, HiddenStates
from lightning_modules.distillation import fill as filling
from lightning_modules.distillation.cache import Sizes, TeacherCache, top_k_of_batch
from lightning_modules.distillation.divergences import DIVERGENCES
from lightning_modules.distillation.fill import fill
from lightning_modules.distillation.recording import cache_for, windows_needed
from lightning_modules.distillation.top_k import TopK, top_k_of
from qat.errors import InputError
from qat.quantizers import MinMaxQuantizer
from tests.conftest import tiny_llama, tiny_tokenizer
from tests.lightning_modules.test_loss import with_auxiliary_loss
from tests.lightning_modules.test_module import Records

WEIGHT2 = qat.Scheme(weight=partial(MinMaxQuantizer, bits=2, granularity="per_group_32"))
K, TOKENS, BATCH = 8, 16, 4


@pytest.fixture
def data(text_file, tmp_path):
    return TextDataModule(
        tiny_tokenizer(), str(text_file), sequence_length=TOKENS, batch_size=BATCH, cache_dir=str(tmp_path / "tokens")
    )


def recorded(data, model, folder, wanted=None, precision=nullcontext, **options):
    """A distillation that learns from a cache, and the cache, filled as a run does it."""
    settings = {"top_k": K, "cache": str(folder), "cache_dtype": "float32", "weight": 0.7} | options
    distillation = Distillation(**settings)
    cache = cache_for(distillation, model, data, "32-true")
    cache.create()
    distillation.make_teacher(model)
    fill(cache, distillation, data, range(len(data.train_windows)) if wanted is None else wanted, None, precision)
    if distillation.needs_gamma:
        first = data.order()[: 2 * BATCH]
        distillation.gamma = cache.confidence(first, [data.train_windows[index]["labels"] for index in first])
    distillation.train_from_cache()
    data.beside = cache.window
    return distillation, cache


def living(data, model, **options):
    distillation = Distillation(**{"top_k": K, "weight": 0.7, **options})
    distillation.make_teacher(model)
    if distillation.needs_gamma:
        distillation.measure_gamma(islice(data.calibration_dataloader(), 2))
    data.beside = None
    return distillation


def losses(tmp_path, data, model, distillation, **options):
    """What every step of a run measures."""
    module = CausalLMModule(
        qat.prepare(model, WEIGHT2), partial(torch.optim.AdamW, lr=1e-3), distill=distillation, loss="auto"
    )
    logger = Records(str(tmp_path))
    settings = {"max_steps": 6, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    settings |= {"logger": logger, "log_every_n_steps": 1, "accumulate_grad_batches": 2, "limit_val_batches": 0}
    pl.Trainer(**(settings | options)).fit(module, datamodule=data)
    found = [row["train/divergence"] for row in logger.metrics.values() if "train/divergence" in row]
    assert len(found) == 6
    return torch.tensor(found, dtype=torch.float64), module.state_dict()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_llama().eval()


def copied(model):
    own = tiny_llama()
    own.load_state_dict(model.state_dict())
    return own


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_in_float32_training_goes_the_same_way_to_the_bit(tmp_path, data, model, name, temperature):
    """Windows are shuffled and batches accumulated; so every row finds its own window.

    Gamma alone is a mean of the same numbers in another order, so it is given.
    """
    options = {"divergence": name, "temperature": temperature, "gamma": 0.3}
    true = losses(tmp_path / "a", data, own := copied(model), living(data, own, **options))
    found = losses(tmp_path / "b", data, own := copied(model), recorded(data, own, tmp_path / "c", **options)[0])
    assert torch.equal(found[0], true[0])
    assert all(torch.equal(found[1][key], value) for key, value in true[1].items())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_16_bits_of_the_run_are_not_those_of_the_cache(tmp_path, data, model, precision):
    """Lightning casts what is floating in a batch, and autocast what is multiplied."""
    mixed = precision == "bf16-mixed"
    context = partial(torch.autocast, "cpu", torch.bfloat16) if mixed else nullcontext
    found = []
    for make in (living, partial(recorded, folder=tmp_path / "c", precision=context)):
        own = copied(model) if mixed else copied(model).to(torch.bfloat16)
        made = make(data, own)
        distillation = made if make is living else made[0]
        found.append(losses(tmp_path / str(len(found)), data, own, distillation, precision=precision)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_in_float16_it_stays_within_what_was_rounded(tmp_path, data, model, name):
    """log p is off by 2^-11 of itself at most, so p by 2^-11 |log p|, and what a sum over p weighs by its entropy.

    The divergence then is off by 2^-11 times entropy times the largest |log(p / q)|; both are less than log 96 here.
    """
    true, _ = losses(tmp_path / "a", data, own := copied(model), living(data, own, divergence=name))
    options = {"divergence": name, "cache_dtype": "float16"}
    found, _ = losses(tmp_path / "b", data, own := copied(model), recorded(data, own, tmp_path / "c", **options)[0])
    assert not torch.equal(found, true)
    torch.testing.assert_close(found[0], true[0], rtol=0, atol=2**-11 * float(np.log(96)) * 2)
    torch.testing.assert_close(found, true, rtol=2e-2, atol=0)


def test_models_whose_head_is_more_than_a_product(tmp_path, data):
    torch.manual_seed(0)
    own = with_auxiliary_loss()
    batch = next(iter(data.train_dataloader()))
    before = living(data, own)
    distillation, _ = recorded(data, own, tmp_path / "c")
    qat.prepare(own, WEIGHT2)
    pair = []
    for each in (before, distillation):
        each.start(own)
        assert each._require_fit().head is None
        cached = next(iter(data.train_dataloader())) if each is distillation else None
        pair.append(float(each.loss(batch, each.teacher_outputs(batch, cached), lambda data: own(**data).loss)[0]))
    assert pair[0] == pytest.approx(pair[1], rel=1e-6)


def test_gamma_is_measured_from_the_cache(tmp_path, data, model):
    true = living(data, copied(model), divergence="cakld").gamma
    distillation, cache = recorded(data, copied(model), tmp_path / "c", divergence="cakld")
    assert distillation.gamma == pytest.approx(true, rel=1e-6)
    assert distillation.teacher is None
    masked = torch.full((TOKENS,), -100)
    with pytest.raises(InputError, match=r"distill.gamma cannot be measured.* Set it, to 0.5"):
        cache.confidence([0], [masked])


class Interrupted(BaseException):
    pass


def test_an_interrupted_computation_ends_with_the_same_files(tmp_path, data, model, monkeypatch):
    recorded(data, copied(model), tmp_path / "whole")
    true_logits, calls = filling.top_k_logits, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 4:
            raise Interrupted
        return true_logits(*args)

    monkeypatch.setattr(filling, "top_k_logits", failing)
    with pytest.raises(Interrupted):
        recorded(data, copied(model), tmp_path / "part")
    assert 0 < np.load(tmp_path / "part" / "done.npy").sum() == 3 * BATCH
    first = len(calls)
    recorded(data, copied(model), tmp_path / "part")
    assert len(calls) == first + len(range(0, len(data.train_windows), BATCH)) - 3  # nothing twice
    files = sorted(file.name for file in (tmp_path / "whole").iterdir())
    assert files == ["cache.json", "done.npy", "indices.npy", "log_p.npy", "next_log_p.npy"]
    for name in files:
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_window_is_done_when_all_of_it_is_on_disk(tmp_path, data, model, monkeypatch):
    """Killed between the first and the last array."""
    _, cache = recorded(data, copied(model), tmp_path / "c", wanted=[0])
    top_k = TopK(torch.zeros(TOKENS, K, dtype=torch.long), torch.zeros(TOKENS, K + 1))
    with pytest.raises(RuntimeError):
        cache.write([1], top_k, SimpleNamespace(cpu=lambda: exec("raise RuntimeError")))
    assert not cache.lacks([0])
    assert cache.lacks([0, 1])
    with pytest.raises(InputError, match="lacks the training window 1: start the run again"):
        cache.window(1)


def test_the_logits_are_those_of_the_teacher(tmp_path, data, model):
    _, cache = recorded(data, copied(model), tmp_path / "c", wanted=[3, 5])
    ids = data.train_windows[5]["input_ids"]
    logits = model(input_ids=ids[None]).logits[0]
    expected = top_k_of(logits, K)
    found = cache.window(5)
    assert torch.equal(found["teacher_indices"].long(), expected.indices)
    log_p = top_k_of_batch({name: value[None] for name, value in found.items()}).log_p
    torch.testing.assert_close(log_p, expected.log_p)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(TOKENS))
    copy = pickle.loads(pickle.dumps(cache))
    assert torch.equal(copy.window(5)["teacher_log_p_bits"], found["teacher_log_p_bits"])
    assert len(pickle.dumps(cache)) < 2000


def test_bytes_of_a_token(tmp_path):
    cache = TeacherCache(tmp_path / "c", Sizes(10, 7, 100, 49152), "float16", {})
    cache.create()
    arrays = [np.load(tmp_path / "c" / f"{name}.npy", mmap_mode="r") for name in ("indices", "log_p", "next_log_p")]
    assert sum(array.nbytes for array in arrays) == 70 * (4 * 100 + 6)
    larger = TeacherCache(tmp_path / "d", Sizes(1, 2, 10, 70_000), "float16", {})
    larger.create()
    top_k = TopK(torch.full((2, 10), 69_999), torch.zeros(2, 11))
    larger.write([0], top_k, torch.zeros(2))
    assert (larger.window(0)["teacher_indices"] == 69_999).all()


def test_16_bits_are_normalised_again():
    log_p = top_k_of(4 * torch.randn(50, 96), K).log_p
    again = TopK(torch.zeros(50, K), log_p.half()).log_p_as(torch.float32)
    torch.testing.assert_close(again.exp().sum(-1), torch.ones(50), rtol=0, atol=1e-6)
    assert torch.equal(TopK(torch.zeros(50, K), log_p).log_p_as(torch.float32), log_p)


def test_a_short_run_needs_the_windows_that_it_sees(data):
    def needed(calibration=0, **options):
        settings = {"max_steps": 2, "accumulate_grad_batches": 3, "world_size": 1, "limit_train_batches": 1.0}
        return windows_needed(data, SimpleNamespace(**(settings | {"overfit_batches": 0.0} | options)), calibration)

    data.setup()
    everything = range(len(data.train_windows))
    batches = [batch["input_ids"] for batch in islice(data.train_dataloader(), 6)]
    seen = torch.stack([data.train_windows[index]["input_ids"] for index in needed()])
    assert torch.equal(torch.cat(batches), seen)
    assert len(needed(world_size=2)) == 12 * BATCH
    assert len(needed(calibration=8)) == 8 * BATCH
    assert len(everything) > 12 * BATCH
    for options in ({"max_steps": -1}, {"max_steps": 1000}, {"limit_train_batches": 3}, {"overfit_batches": 1}):
        assert needed(**options) == everything


def test_batches_to_calibrate_with_have_tokens_only(tmp_path, data, model):
    recorded(data, copied(model), tmp_path / "c")
    assert next(iter(data.calibration_dataloader())).keys() == {"input_ids", "labels"}
    assert next(iter(data.val_dataloader())).keys() == {"input_ids", "labels"}
    assert next(iter(data.train_dataloader())).keys() == {
        "input_ids",
        "labels",
        "teacher_indices",
        "teacher_log_p_bits",
    }


def test_other_settings_are_refused_by_name(tmp_path, data, model, text_file):
    recorded(data, copied(model), tmp_path / "c", wanted=[0])

    def again(changed=None, own=data, precision="32-true", **options):
        settings = {"top_k": K, "cache": str(tmp_path / "c"), "cache_dtype": "float32"} | options
        cache_for(Distillation(**settings), copied(model) if changed is None else changed, own, precision)

    again()
    other = copied(model)
    with torch.no_grad():
        other.model.norm.weight[0] += 1e-6
    shorter = TextDataModule(tiny_tokenizer(), str(text_file), sequence_length=8, cache_dir=str(tmp_path / "tokens"))
    elsewhere = tmp_path / "other.txt"
    elsewhere.write_text(text_file.read_text().replace("fox", "cow"))
    reworded = TextDataModule(tiny_tokenizer(), str(elsewhere), sequence_length=16, cache_dir=str(tmp_path / "tokens"))
    for call, message in (
        (partial(again, top_k=4), r"with top k 8 \(now 4\): give this run a folder of its own"),
        (partial(again, temperature=2), r"with temperature 1.0 \(now 2.0\)"),
        (partial(again, cache_dtype="float16"), r"with dtype float32 \(now float16\)"),
        (partial(again, dtype="bfloat16"), r"with teacher dtype float32 \(now bfloat16\)"),
        (partial(again, precision="bf16-mixed"), r"with precision 32-true \(now bf16-mixed\)"),
        (partial(again, changed=other), r"with teacher \w{16} \(now \w{16}\)"),
        (partial(again, own=shorter), r"tokens 16 \(now 8\)"),
        (partial(again, own=reworded), r"with text \w{16} \(now \w{16}\)"),
        (partial(again, cache=str(tmp_path / "tokens")), r"is no cache of a teacher: give a folder that is not there"),
        (partial(again, top_k=96), r"the vocabulary has 96 tokens: distill.cache keeps"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_another_teacher_is_known_without_loading_it(tmp_path, data, model):
    model.save_pretrained(tmp_path / "teacher")
    before = fingerprint.of_named_model(str(tmp_path / "teacher"))
    (tmp_path / "teacher" / "notes.txt").write_text("x")
    assert fingerprint.of_named_model(str(tmp_path / "teacher")) == before
    other = copied(model)
    with torch.no_grad():
        other.model.norm.weight[0] += 1e-6
    other.save_pretrained(tmp_path / "teacher")
    assert fingerprint.of_named_model(str(tmp_path / "teacher")) != before
    assert fingerprint.of_named_model("no/such-model") == "no/such-model@None"
    assert fingerprint.of_model(model) == fingerprint.of_model(copied(model)) != fingerprint.of_model(other)
    bent = copied(model)
    bent.config.hidden_act = "gelu"
    assert fingerprint.of_model(bent) != fingerprint.of_model(model)


def test_what_does_not_go_with_a_cache_is_refused(tmp_path, data, model, monkeypatch):
    with pytest.raises(InputError, match=r"likeliest tokens alone: set distill.top_k=100"):
        Distillation(cache="x")
    with pytest.raises(InputError, match=r"set distill.hidden.weight=0, or distill.cache=null"):
        Distillation(cache="x", top_k=4, hidden=HiddenStates(1.0))
    with pytest.raises(InputError, match=r"distill.cache_dtype is 'float61'. Did you mean 'float16'"):
        Distillation(cache="x", top_k=4, cache_dtype="float61")
    stream = HubDataModule(tiny_tokenizer(), "none", streaming=True)
    stream.train_windows = WindowStream(list, tiny_tokenizer(), TOKENS)
    with pytest.raises(InputError, match=r"set data.streaming=false"):
        cache_for(Distillation(cache="x", top_k=4), model, stream, "32-true")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"0.0 GiB are free: set a smaller distill.top_k"):
        recorded(data, copied(model), tmp_path / "c")
    distillation = Distillation(cache="x", top_k=4)
    distillation.train_from_cache()
    distillation.start(qat.prepare(copied(model), WEIGHT2))
    with pytest.raises(InputError, match=r"no cached logits of the teacher: set data.beside = cache.window"):
        distillation.teacher_outputs({"input_ids": torch.zeros(1, 2)}, {})


def test_the_description_can_be_read(tmp_path, data, model):
    recorded(data, copied(model), tmp_path / "c", wanted=[0])
    made = json.loads((tmp_path / "c" / "cache.json").read_text())
    assert made["top_k"] == K
    assert made["tokens"] == TOKENS
    assert made["windows"] == len(data.train_windows)
