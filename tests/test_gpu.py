"""The grid contract on a GPU: to kernel tolerance, and a whole run."""

from functools import partial

import pytest
import torch

import qat
from qat.export.parity import check_logits
from qat.kernels.linear import fake_quantized_linear
from qat.numerics.functional import fake_quantize
from tests.conftest import tiny_llama
from tests.lightning_modules.test_cli import shell  # noqa: F401
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
