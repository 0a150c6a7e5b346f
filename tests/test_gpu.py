"""The grid contract on a GPU: to kernel tolerance, and a whole run."""

import copy
import json
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

import qat
from lightning_modules.callbacks import LastCheckpoint, StepSeed
from lightning_modules.causal_lm import CausalLMModule
from lightning_modules.compilation import CompiledBlocks, _options
from lightning_modules.loss import HeadLoss
from qat.export.parity import check_logits
from qat.kernels.codebook_means import reference
from qat.kernels.linear import fake_quantized_linear
from qat.kernels.scaled_product import tensor_cores
from qat.numerics.functional import fake_quantize
from qat.numerics.metrics import sqnr
from qat.quantizers import MinMaxQuantizer
from tests.conftest import tiny_llama
from tests.kernels.test_codebook_means import stepped
from tests.kernels.test_scaled_product import PAIRS, exact, operand
from tests.lightning_modules.test_cli import shell  # noqa: F401
from tests.lightning_modules.test_module import Batches, Records, fit
from tests.nn.kv_models import in_parts, quantized, whole
from tests.nn.kv_models import tokens as kv_tokens
from tests.nn.test_low_bit_linear import BACKWARD, gradients, layer_of
from tests.quantizers.test_contract import quantizers
from tests.test_configs import composed
from tests.transforms.test_prepare import SCHEMES, tokens

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_and_shipped_logits_agree(name, dtype, tmp_path):
    model = qat.prepare(tiny_llama().cuda().to(dtype), SCHEMES[name]).eval()
    ids = tokens().cuda()
    qat.calibrate(model, [{"input_ids": ids}])
    with torch.no_grad():
        trained = model(ids).logits
        loaded = qat.load(qat.save(qat.convert(model), tmp_path / "artifact")).cuda()
        check_logits(trained, loaded(ids).logits, exact=False)


def test_gradients_equal_those_of_the_definition():
    quantizer = partial(SCHEMES["lsq"].weight)(shape=(64, 128)).cuda()
    weight = torch.randn(64, 128, device="cuda", requires_grad=True)
    quantizer.initialize(weight)
    x = torch.randn(8, 128, device="cuda")
    qparams = quantizer.qparams(weight)
    settings = (qparams, quantizer.format, quantizer.granularity)
    leaves = [weight, quantizer.log_scale]
    fused = torch.autograd.grad(fake_quantized_linear(x, weight, None, *settings).sum(), leaves, retain_graph=True)
    plain = torch.autograd.grad((x @ fake_quantize(weight, *settings).T).sum(), leaves)
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


def test_a_whole_run_on_the_gpu(shell):  # noqa: F811
    shell.run("debug=fast", "trainer.accelerator=gpu", "trainer.precision=bf16-mixed")


def test_a_step_is_profiled_on_the_gpu(shell):  # noqa: F811
    shell.run("trainer.max_steps=6", "trainer.accelerator=gpu", "callbacks.profile.steps=2", "hydra.run.dir=run")
    found = json.loads((shell.folder / "run" / "profile.json").read_text())
    milliseconds = {row["what"]: row["ms"] for row in found["time"]}
    assert found["device"] == "cuda"
    assert sum(milliseconds.values()) == pytest.approx(found["ms_a_step"])
    assert all(spent > 0 for spent in milliseconds.values())


@pytest.mark.parametrize("graphs", ["false", "true"])
def test_a_compiled_step_is_profiled_on_the_gpu(shell, graphs):  # noqa: F811
    compiled = "module.compile=inductor", f"module.cuda_graphs={graphs}", "trainer.accelerator=gpu"
    profile = "callbacks.profile.steps=2", "callbacks.profile.warmup=5"
    shell.run("trainer.max_steps=9", *compiled, *profile, "hydra.run.dir=run")
    found = json.loads((shell.folder / "run" / "profile.json").read_text())
    milliseconds = {row["what"]: row["ms"] for row in found["time"]}
    assert sum(milliseconds.values()) == pytest.approx(found["ms_a_step"])
    assert all(milliseconds[what] > 0 for what in ("fake quantization", "matrix products", "fused by the compiler"))
    assert len(found["notes"]) == (2 if graphs == "true" else 1)


@pytest.mark.parametrize("compile", ["aot_eager", "inductor"])
def test_compiled_blocks_compute_the_same_on_the_gpu(compile):
    model = qat.prepare(tiny_llama().cuda(), SCHEMES["w4a8"]).train()
    ids = tokens().cuda()
    expected = model(input_ids=ids, labels=ids, use_cache=False).loss
    with CompiledBlocks(model, compile).step():
        found = model(input_ids=ids, labels=ids, use_cache=False).loss
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


class BatchesAndARest(Batches):
    """Two batches, the second smaller, and an evaluation after both."""

    def train_dataloader(self):
        ids = torch.randint(0, 96, (3, 16), generator=torch.Generator().manual_seed(0))
        return DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=2)

    val_dataloader = train_dataloader


@pytest.mark.parametrize("name", ["fp8", "w4a8"])
def test_cuda_graphs_train_as_compiled_blocks_do(name, tmp_path):
    """Gradients that are rounded at random are drawn anew at every replay, from the seed of the step."""
    recipe = partial(torch.optim.AdamW, lr=1e-3)
    models = [qat.prepare(tiny_llama().bfloat16(), instantiate(composed(tmp_path, f"scheme={name}").scheme))]
    models += [copy.deepcopy(models[0]) for _ in range(2)]
    losses = []
    for model, graphs in zip(models, (False, True, True), strict=True):
        module = CausalLMModule(model, recipe, compile="inductor", cuda_graphs=graphs)
        torch._dynamo.reset()
        options = {"max_steps": 6, "max_epochs": -1, "accelerator": "gpu", "gradient_clip_val": 1.0}
        logger = Records(str(tmp_path))
        trainer = pl.Trainer(callbacks=[StepSeed(0)], logger=logger, log_every_n_steps=1, **options)
        trainer.fit(module, datamodule=BatchesAndARest())
        rows = logger.metrics
        losses.append(torch.tensor([row["train/loss"] for row in rows.values() if "train/loss" in row]))
    assert len(losses[0]) == 6
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=0)
    torch.testing.assert_close(losses[2], losses[1], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw8bit"])
def test_a_paged_state_is_paged_again_after_a_checkpoint(name, tmp_path):
    factory = instantiate(composed(tmp_path, f"optimizer={name}").optimizer)
    whole, first, second = (CausalLMModule(tiny_llama(intermediate_size=4096), factory) for _ in range(3))
    for other in (first, second):
        other.load_state_dict(whole.state_dict())
    fit(tmp_path, whole, accelerator="gpu")
    last = LastCheckpoint(str(tmp_path), every_n_steps=2)
    fit(tmp_path, first, last, max_steps=2, accelerator="gpu")
    fit(tmp_path, second, ckpt_path=last.path, accelerator="gpu")
    for own, resumed in zip(whole.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(resumed, own)
    states = [s for s in second.optimizers(use_pl_optimizer=False).state.values() if s["state1"].numel() >= 100_000]
    assert len(states) == 6
    assert all(state["state1"].is_paged for state in states)


@pytest.mark.parametrize("kind", ["chunked", "liger", "cce"])
def test_losses_at_the_head_equal_the_models_on_the_gpu(kind):
    pytest.importorskip({"liger": "liger_kernel", "cce": "cut_cross_entropy"}.get(kind, "torch"))
    model = qat.prepare(tiny_llama(hidden_size=128, head_dim=32).cuda().bfloat16(), SCHEMES["head_too"]).train()
    data = {"input_ids": (ids := torch.randint(0, 96, (8, 64), device="cuda")), "labels": ids}
    expected, found = model(**data, use_cache=False).loss, HeadLoss(model, kind)(data)
    torch.testing.assert_close(found.float(), expected.float(), rtol=1e-2, atol=0)
    leaf = model.lm_head.weight
    ours, theirs = (torch.autograd.grad(loss, leaf)[0].float() for loss in (found, expected))
    assert (ours - theirs).norm() < 0.03 * theirs.norm()


@pytest.mark.parametrize("path", list(quantizers()))
def test_every_quantizer_computes_as_on_the_cpu(path):
    """The same codes but where a rounding flips, and the grid contract on the GPU itself."""
    factory = instantiate(OmegaConf.load(path))
    x = torch.randn(64, 192)
    here, there = factory(shape=x.shape), factory(shape=x.shape).cuda()
    here.initialize(x)
    there.load_state_dict(here.state_dict())
    q = there.quantize(x.cuda())
    if not there.stochastic:
        assert torch.equal(there(x.cuda()), q.dequantize())
        assert (here.quantize(x).codes == q.codes.cpu()).float().mean() > 0.999
    assert sqnr(x, q.dequantize().cpu()) > 3


@pytest.mark.parametrize("entries", [2, 3, 8, 16, 256])
@pytest.mark.parametrize("shape", [(64, 512), (1, 100_000), (7, 33)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_refresh_kernel_equals_its_reference(entries, shape, weighted):
    x = torch.randn(shape, device="cuda")
    codebook = torch.rand(shape[0], entries, device="cuda") * 8 - 4  # some entries are dead
    scale = torch.rand(shape[0], 1, device="cuda") + 0.5
    importance = torch.rand(shape, device="cuda") if weighted else None
    moved = stepped(x, scale, codebook, importance)
    assert torch.equal(moved, stepped(x, scale, codebook, importance))
    expected = stepped(x, scale, codebook, importance, reference.lloyd_step_)
    if entries <= 16:
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-3)
    # Of many dead entries, which goes where hangs on the last bit of an error; what is left of the error does not.
    left = [_squared_error(x / scale, table, importance) for table in (moved, expected)]
    torch.testing.assert_close(*left, rtol=0.05, atol=1e-6)


def _squared_error(v, codebook, importance):
    parts = [(part[:, :, None] - codebook[:, None]).square().amin(2) for part in v.split(10_000, 1)]
    distance = torch.cat(parts, dim=1)
    return (distance if importance is None else distance * importance).sum()


@pytest.mark.parametrize("layout", ["int4", "nf4", "fp8", "kivi4_window8"])
def test_a_quantized_cache_serves_what_was_trained(layout):
    model = quantized(layout).cuda()
    ids = kv_tokens().cuda()
    torch.testing.assert_close(in_parts(model, ids, 7)[0], whole(model, ids))
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, ids.shape[1] + 4)


def test_gradients_are_rounded_without_bias_on_the_gpu():
    quantizer = MinMaxQuantizer((64,), bits=8, granularity="per_token", rounding="stochastic").cuda()
    x = torch.randn(32, 64, device="cuda")
    mean = torch.stack([quantizer(x) for _ in range(500)]).mean(0)
    assert sqnr(x, mean) > sqnr(x, quantizer(x)) + 20


@pytest.mark.parametrize("names", PAIRS, ids=str)
@pytest.mark.parametrize("sizes", [(1, 7, 33), (17, 40, 24), (256, 512, 384)], ids=str)
@pytest.mark.parametrize("scales", [("rows", "rows"), ("one", None)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensor_cores_multiply_codes_as_the_definition_does(names, sizes, scales, dtype):
    operands = [operand(rows, sizes[2], name, own) for rows, name, own in zip(sizes, names, scales, strict=False)]
    a, b = (o._replace(codes=o.codes.cuda(), scale=None if o.scale is None else o.scale.cuda()) for o in operands)
    y, expected = tensor_cores.scaled_product(a, b, dtype).double().cpu(), exact(*operands)
    # Tensor cores add 8-bit floats with fewer digits than float32 has.
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5 if names[0] == "int8" else 1e-3
    assert (y - expected).norm() <= rounding * expected.norm()


@pytest.mark.parametrize("name", BACKWARD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "inductor"])
def test_products_of_codes_compute_on_the_gpu_what_fake_quantization_does(name, dtype, compile):
    torch._dynamo.reset()
    layer = layer_of(BACKWARD[name], 256, 128).cuda().to(dtype)
    x, g = torch.randn(3, 50, 256, device="cuda", dtype=dtype), torch.randn(3, 50, 128, device="cuda", dtype=dtype)
    layer.grad_quantizer.enabled = False
    expected_y, expected = gradients(layer.eval(), x, g)
    layer.train()
    if compile:
        layer.compile(fullgraph=True, options=_options("inductor", cuda_graphs=False))
    y, found = gradients(layer, x, g)
    assert (y - expected_y).norm() < 0.01 * expected_y.norm()
    for key in ("x", "weight"):
        assert (found[key] - expected[key]).norm() < (0.15 if "fp8" in name else 0.02) * expected[key].norm()


@pytest.mark.parametrize("name", ["w8a8g8", "fp8"])
def test_a_compiled_run_with_products_of_codes_on_the_gpu(shell, name):  # noqa: F811
    shell.options = [option for option in shell.options if not option.startswith("scheme")]
    compiled = ("module.compile=inductor", "trainer.precision=bf16-mixed", "trainer.accelerator=gpu")
    shell.run("debug=fast", f"scheme={name}", *compiled)
