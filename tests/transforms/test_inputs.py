"""What flows into the layers of a block, gathered in one pass."""

import torch

from qat.quantizers import MinMaxQuantizer
from qat.transforms import Scheme, prepare
from qat.transforms.blocks import walk
from qat.transforms.inputs import hessians, quantized_linears, squares
from qat.transforms.plain import full_precision
from tests.conftest import tiny_llama
from tests.models import tiny_mixtral
from tests.transforms.texts import batches


def gathered(model, measure=hessians):
    """What `measure` finds of the first block, and X of each of its layers."""
    prepare(model, Scheme(weight=MinMaxQuantizer))
    found = []

    def work(block):
        if block.index:
            return
        seen = {name: [] for name in quantized_linears(block.module)}
        hooks = [
            layer.register_forward_pre_hook(lambda m, args, name=name: seen[name].append(args[0].flatten(0, -2)))
            for name, layer in quantized_linears(block.module).items()
        ]
        with torch.no_grad():
            found.extend((measure(block), {name: torch.cat(x) for name, x in seen.items() if x}))
        for hook in hooks:
            hook.remove()

    with full_precision(model):
        walk(model, batches(3), work, "test")
    return found


def test_layers_with_the_same_input_share_one_sum_over_all_calls():
    sums, seen = gathered(tiny_llama())
    assert [sorted(name.rpartition(".")[2] for name in group) for group, _ in sums] == [
        ["k_proj", "q_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]
    for group, total in sums:
        for name in group:
            assert torch.allclose(total, seen[name].T @ seen[name], rtol=1e-4, atol=1e-4)


def test_each_batch_passes_the_block_once():
    _, seen = gathered(tiny_llama())
    tokens = sum(batch["input_ids"].numel() for batch in batches(3))
    assert all(len(x) == tokens for x in seen.values())


def test_squares_are_the_diagonals():
    both = zip(gathered(tiny_mixtral(), squares)[0], gathered(tiny_mixtral())[0], strict=True)
    for (_, diagonal), (_, hessian) in both:
        assert diagonal.shape == hessian.diagonal().shape
