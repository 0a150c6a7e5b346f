from functools import partial

import pytest
import pytorch_lightning as pl
import torch

import qat
from lightning_modules.callbacks import OscillationFreezing, PrecisionSchedule, PruneSchedule, WeightEMA
from lightning_modules.causal_lm import CausalLMModule
from qat.errors import InputError
from qat.numerics.metrics import sqnr
from qat.quantizers import KMeansQuantizer, LSQQuantizer, MinMaxQuantizer
from qat.transforms.layers import quantized_weights
from tests.conftest import tiny_llama
from tests.lightning_modules.test_codebooks import Watch
from tests.lightning_modules.test_module import Batches, fit
from tests.lightning_modules.test_prune_schedule import KeepAt

LSQ4 = partial(LSQQuantizer, bits=4, granularity="per_group_32")
WEIGHTS = {
    "lsq": LSQ4,
    "lsq+": partial(LSQQuantizer, bits=4, symmetric=False),
    "minmax": partial(MinMaxQuantizer, bits=4),
    "static": partial(MinMaxQuantizer, bits=4, dynamic=False),
}
ADAMW = partial(torch.optim.AdamW, lr=1e-2)
FALLING = {0: 8, 2: 6, 4: 4}


def module(weight=LSQ4, **options):
    torch.manual_seed(0)
    return CausalLMModule(qat.prepare(tiny_llama(), qat.Scheme(weight=weight)), ADAMW, **options)


def bits_of(own):
    return {w.label: w.quantizer.format.bits for w in quantized_weights(own)}


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_bits_fall_and_what_ships_has_the_last(weight, tmp_path):
    own, watch = module(weight), Watch(lambda m: set(bits_of(m).values()))
    rows = fit(tmp_path, own, PrecisionSchedule(FALLING), watch, max_steps=6, log_every_n_steps=1)
    assert watch.seen == [{8}, {8}, {6}, {6}, {4}, {4}]
    assert [row["train/bits"] for row in rows.values() if "train/bits" in row] == [8, 8, 6, 6, 4, 4]
    ids = torch.arange(8)[None]
    logits = own.eval().model(input_ids=ids).logits
    qat.save(qat.convert(own.model), tmp_path / "artifact")
    loaded = qat.load(tmp_path / "artifact", tiny_llama())
    assert torch.equal(loaded(input_ids=ids).logits, logits)
    packed = [m for m in loaded.modules() if type(m).__name__ == "PackedLinear"]
    assert {layer.weight.format.bits for layer in packed} == {4}


def test_the_optimizer_goes_on_with_its_state(tmp_path):
    """The scales are the same Parameters, whose moments a change of bits leaves as they are."""

    class Moments(pl.Callback):
        seen = ()

        def on_train_batch_start(self, trainer, pl_module, *args):
            state = trainer.optimizers[0].state
            own = [state[w.quantizer.log_scale] for w in quantized_weights(pl_module)]
            self.seen = (*self.seen, [int(s["step"]) for s in own if s])

    moments = Moments()
    fit(tmp_path, module(), PrecisionSchedule(FALLING), moments, max_steps=6)
    assert moments.seen[5] == [5] * 14


def test_accumulated_batches_change_bits_once(tmp_path):
    own, watch = module(), Watch(lambda m: set(bits_of(m).values()))
    schedule = PrecisionSchedule({0: 8, 2: 4})
    fit(tmp_path, own, schedule, watch, max_steps=4, accumulate_grad_batches=2)
    assert watch.seen == [{8}] * 4 + [{4}] * 4


def test_rules_are_for_the_layers_that_they_match(tmp_path):
    own, watch = module(), Watch(bits_of)
    rules = {"*.down_proj": {0: 6, 3: 4}, "*.layers.0.*": None}
    fit(tmp_path, own, PrecisionSchedule(FALLING, rules), watch, max_steps=5)
    for step, (rest, down) in enumerate(zip((8, 8, 6, 6, 4), (6, 6, 6, 4, 4), strict=True)):
        for label, bits in watch.seen[step].items():
            expected = down if "down_proj" in label else 4 if ".layers.0." in label else rest
            assert bits == expected


def test_full_precision_comes_first(tmp_path):
    """The same as a model that quantizes nothing, and then quantizers that fit what it has become."""
    full, delayed = CausalLMModule(fresh_llama(), ADAMW), module()
    fit(tmp_path, full, max_steps=3)
    names = {name for name, _ in full.named_parameters()}
    watch = Watch(lambda m: {name: p.detach().clone() for name, p in m.named_parameters() if name in names})
    fitted = Watch(lambda m: [w.quantizer.enabled for w in quantized_weights(m)])
    rows = fit(tmp_path, delayed, PrecisionSchedule(delay_steps=3), watch, fitted, max_steps=5, log_every_n_steps=1)
    for name, parameter in full.named_parameters():
        assert torch.equal(parameter, watch.seen[2][name])
    assert [set(enabled) for enabled in fitted.seen] == [{False}] * 3 + [{True}] * 2
    assert [row["train/bits"] for row in rows.values() if "train/bits" in row] == [32, 32, 32, 4, 4]


def test_quantizers_are_fitted_when_the_delay_is_over(tmp_path):
    own = module()
    with torch.no_grad():
        for weight in quantized_weights(own):
            weight.quantizer.log_scale.fill_(5.0)  # what was fitted before is of no use any more
    schedule = PrecisionSchedule(delay_steps=2)
    fit(tmp_path, own, schedule, max_steps=3)
    for weight in quantized_weights(own):
        assert sqnr(weight.matrix, weight.quantizer(weight.matrix)) > 10


def fresh_llama():
    torch.manual_seed(0)
    return tiny_llama()


def test_bits_wait_for_their_sqnr(tmp_path):
    """One layer is kept from 4 bits by a weight that spans its range, as long as it does."""
    own = module(partial(LSQQuantizer, bits=4, granularity="per_tensor"))
    first = next(iter(quantized_weights(own)))
    with torch.no_grad():
        first.quantizer.log_scale += 3  # a step as long as most weights are
    watch = Watch(bits_of)
    schedule = PrecisionSchedule({0: 8, 2: 4}, sqnr=12.0, every_n_steps=1, end_step=4)
    fit(tmp_path, own, schedule, watch, max_steps=6)
    assert set(watch.seen[1].values()) == {8}
    assert watch.seen[-1].pop(first.label) == 8
    assert set(watch.seen[-1].values()) == {4}
    packed = qat.convert(own.model).get_submodule(first.label.removeprefix("model."))
    assert packed.format.bits == 8


def test_looks_are_rare_and_end(tmp_path):
    """Without noise at the start the limit is a question of when one looks."""
    looks = []

    class Counting(PrecisionSchedule):
        def _allows(self, weight, bits):
            looks.append((self._looked_at, bits))
            return False

    fit(tmp_path, module(), Counting({0: 8, 3: 4}, sqnr=1.0, every_n_steps=2, end_step=8), max_steps=12)
    assert {step for step, _ in looks} == {3, 5, 7}
    assert len(looks) == 3 * 14


def resumed(again, path, *callbacks, max_steps=8):
    trainer = pl.Trainer(
        max_steps=max_steps, accelerator="cpu", logger=False, callbacks=list(callbacks), enable_checkpointing=False
    )
    trainer.fit(again, datamodule=Batches(), ckpt_path=path, weights_only=True)


SCHEDULES = {
    "steps": (partial(PrecisionSchedule, {0: 8, 3: 6, 6: 4}), 4),
    "at a change": (partial(PrecisionSchedule, {0: 8, 4: 4}), 4),
    "delay": (partial(PrecisionSchedule, {0: 8, 6: 4}, delay_steps=5), 4),
    "delay over": (partial(PrecisionSchedule, {0: 8, 6: 4}, delay_steps=3), 4),
    "at the end of the delay": (partial(PrecisionSchedule, delay_steps=4), 4),
    "sqnr": (partial(PrecisionSchedule, {0: 8, 1: 6, 2: 4}, sqnr=20.0, every_n_steps=1, end_step=7), 4),
}


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize(("schedule", "at"), SCHEDULES.values(), ids=SCHEDULES)
def test_a_resumed_run_ends_with_the_same_bits(schedule, at, weight, tmp_path):
    whole, again, path = module(weight), module(weight), tmp_path / "middle.ckpt"
    fit(tmp_path, whole, schedule(), KeepAt(at, path), max_steps=8)
    resumed(again, path, schedule())
    assert bits_of(whole) == bits_of(again)
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.state_dict().items())


def test_a_finished_run_is_taken_up_with_its_bits(tmp_path):
    schedule = partial(PrecisionSchedule, {0: 8, 2: 4}, sqnr=99.0, end_step=3)
    whole, again, path = module(), module(), tmp_path / "last.ckpt"
    fit(tmp_path, whole, schedule(), KeepAt(4, path), max_steps=4)
    resumed(again, path, schedule(), max_steps=4)
    assert set(bits_of(again).values()) == {8}


def test_compiled_blocks_follow(tmp_path):
    eager, compiled = module(), module(compile="aot_eager")
    for own in (eager, compiled):
        fit(tmp_path, own, PrecisionSchedule({0: 8, 3: 4}, delay_steps=1), max_steps=5)
    for name, parameter in eager.named_parameters():
        torch.testing.assert_close(parameter, compiled.get_parameter(name), rtol=1e-3, atol=1e-4)


def test_it_goes_together_with_freezing_pruning_and_an_average(tmp_path):
    own, path = module(), tmp_path / "middle.ckpt"

    def callbacks():
        return (
            PruneSchedule(0.5, end_step=6, every_n_steps=2),
            PrecisionSchedule({0: 8, 3: 4}),
            OscillationFreezing(threshold=0.05, momentum=0.3),
            WeightEMA(0.8, start_step=3),
        )

    again = module()
    fit(tmp_path, own, *callbacks(), KeepAt(6, path), max_steps=10)
    resumed(again, path, *callbacks(), max_steps=10)
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in own.state_dict().items())
    with pytest.raises(InputError, match=r"set callbacks\.average\.start_step=3"):
        fit(tmp_path, module(), PrecisionSchedule({0: 8, 3: 4}), WeightEMA(0.8), max_steps=10)


def test_another_grid_sets_frozen_weights_free(tmp_path):
    own, freezing = module(), OscillationFreezing(threshold=0.05, momentum=0.5)
    share = Watch(lambda m: sum(int(h.frozen.sum()) for h in freezing._histories.values()))
    fit(tmp_path, own, PrecisionSchedule({0: 8, 9: 4}), freezing, share, max_steps=10)
    assert share.seen[8] > 0
    assert share.seen[9] == 0


def test_off_means_off(tmp_path):
    plain, own = module(), module()
    fit(tmp_path, plain, max_steps=3)
    fit(tmp_path, own, PrecisionSchedule(), max_steps=3)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), own.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": {0: 8, 4: 4}}, "changes bits until step 4, the training ends after 4: nothing would train on what"),
        ({"delay_steps": 4}, "changes bits until step 4, the training ends after 4"),
        ({"bits": {0: 8, 1: 4}, "sqnr": 9.0, "end_step": 9}, "changes bits until step 9"),
        ({"bits": {0: 8, 2: 3}}, "ends at 3 bits, and the scheme ships 4: let it end at 4, or set"),
        ({"bits": {2: 8, 0: 4}}, "has the steps .2, 0.: they start at 0 and rise"),
        ({"bits": {0: 9, 2: 4}}, "2 to 8 bits, not 9"),
        ({"bits": "8"}, "bits is 8: give bits by steps, as in"),
        ({"bits": {0: 4, 2: 8, 3: 4}, "sqnr": 9.0}, "let each be fewer than the one before"),
        ({"sqnr": 9.0}, "says when bits may fall, and none do: set its bits too"),
        ({"rules": {"*.donw_proj": {0: 8, 2: 4}}}, "matches no layer that is quantized"),
        ({"delay_steps": -1}, "delay_steps and end_step start at 0, every_n_steps at 1"),
    ],
    ids=["late", "delay", "look", "ships", "order", "bits", "number", "rise", "sqnr", "rule", "negative"],
)
def test_bad_options_name_the_mend(options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        fit(tmp_path, module(), PrecisionSchedule(**options), max_steps=4)


def test_grids_of_one_size_are_refused_unless_only_delayed(tmp_path):
    kmeans = partial(KMeansQuantizer, bits=4)
    with pytest.raises(InputError, match=r"layers\.0.*codebook16 has 4 bits and no others"):
        fit(tmp_path, module(kmeans), PrecisionSchedule({0: 8, 2: 4}), max_steps=4)
    fit(tmp_path, module(kmeans), PrecisionSchedule(delay_steps=2), max_steps=4)


def test_without_quantized_weights_it_is_refused(tmp_path):
    with pytest.raises(InputError, match="is for quantized weights, and the scheme has none"):
        fit(tmp_path, CausalLMModule(tiny_llama(), ADAMW), PrecisionSchedule(delay_steps=1), max_steps=2)


def test_products_of_codes_are_refused(tmp_path):
    scheme = qat.Scheme(
        weight=partial(MinMaxQuantizer, bits=4),
        input=partial(MinMaxQuantizer, bits=8, granularity="per_token"),
        compute="int8",
    )
    own = CausalLMModule(qat.prepare(tiny_llama(), scheme), ADAMW)
    with pytest.raises(InputError, match=r"set scheme\.compute=fake"):
        fit(tmp_path, own, PrecisionSchedule({0: 8, 2: 4}), max_steps=4)


def test_a_checkpoint_of_another_schedule_is_refused(tmp_path):
    path = tmp_path / "middle.ckpt"
    fit(tmp_path, module(), PrecisionSchedule({0: 8, 1: 6, 2: 4}), KeepAt(4, path), max_steps=4)
    with pytest.raises(InputError, match="is of another schedule of bits"):
        resumed(module(), path, PrecisionSchedule())
