"""A batch has the gradients of its parts: accumulated, computed again, of two processes, of sharded weights."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import qat
from lightning_modules.compilation import CompiledBlocks
from qat.errors import InputError
from qat.quantizers import KMeansQuantizer, LSQQuantizer, MinMaxQuantizer
from qat.transforms import codebooks
from qat.transforms.step_codes import ModelStepCodes
from tests.conftest import tiny_llama
from tests.lightning_modules.test_cli import Shell, weights

TOKEN8 = partial(MinMaxQuantizer, bits=8, granularity="per_token")
SCHEMES = {
    "lsq": qat.Scheme(weight=partial(LSQQuantizer, bits=3, granularity="per_group_32"), input=TOKEN8, embedding=True),
    "kmeans": qat.Scheme(weight=partial(KMeansQuantizer, bits=3, learn_scale=True)),
    "learned activations": qat.Scheme(
        weight=partial(LSQQuantizer, bits=4), input=partial(LSQQuantizer, bits=8, granularity="per_tensor")
    ),
}
HOW = ("plain", "accumulated", "checkpointed", "reentrant", "compiled")
PARALLEL = ("ddp", "fsdp")
CASES = [(s, p, h) for s in SCHEMES for p in PARALLEL for h in HOW if h != "compiled" or s == "lsq"]


def prepared(scheme):
    torch.manual_seed(0)
    model = qat.prepare(tiny_llama(), SCHEMES[scheme])
    if scheme == "learned activations":
        qat.calibrate(model, [{"input_ids": batch()}])
    return model.train()


def batch():
    return torch.randint(0, 96, (8, 16), generator=torch.Generator().manual_seed(1))


def backward(model, ids, parts=1):
    for part in ids.chunk(parts):
        (model(input_ids=part, labels=part, use_cache=False).loss / parts).backward()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model):
    named = ((name.removeprefix("module."), p.grad) for name, p in model.named_parameters())
    return {name: whole(grad).clone() for name, grad in named if grad is not None}


def train_as(model, how):
    """Set `model` up; in how many parts its batch comes."""
    if how in ("accumulated", "checkpointed", "reentrant"):
        ModelStepCodes(model)
    if how in ("checkpointed", "reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
        model.enable_input_require_grads()
    if how == "compiled":
        CompiledBlocks(model, "aot_eager")
    return 2 if how in ("accumulated", "checkpointed") else 1


def furthest(found, expected):
    """The largest difference of a gradient, relative to the largest of its tensor."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - g).abs().max() / g.abs().max().clamp(min=1e-12)) for n, g in expected.items())


@pytest.mark.parametrize("how", HOW[1:4])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_process(scheme, how):
    expected = prepared(scheme)
    backward(expected, batch())
    model = prepared(scheme)
    backward(model, batch(), train_as(model, how))
    assert furthest(gradients(model), gradients(expected)) < 1e-5


def in_two_processes(work, *arguments):
    """`work(rank, *arguments)` in both, connected by gloo."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)  # kept: a port that is only found free may soon be another's
    with torch.multiprocessing.get_context("spawn").Manager() as manager:
        found = manager.dict()
        torch.multiprocessing.spawn(_connected, (store.port, work, found, *arguments), nprocs=2)
        return dict(found)


def _connected(rank, port, work, found, *arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.TCPStore("127.0.0.1", port), rank=rank, world_size=2)
    result = work(rank, *arguments)
    if rank == 0:
        found.update(result)
    dist.barrier()
    dist.destroy_process_group()


def differences(rank):
    """Of every gradient to that of one process with the whole batch, by scheme, way of training and parallelism."""
    found = {}
    for scheme in SCHEMES:
        reference = prepared(scheme)
        backward(reference, batch())
        for case in (case for case in CASES if case[0] == scheme):
            model = prepared(scheme)
            parts = train_as(model, case[2])
            backward(spread(model, case[1]), batch().chunk(2)[rank], parts)
            found[case] = furthest(gradients(model), gradients(reference))
    return found | sharded(rank)


def spread(model, parallel, **options):
    if parallel == "ddp":
        return DistributedDataParallel(model)
    return qat.shard(model, mesh=init_device_mesh("cpu", (2,)), **options)


def sharded(rank):
    """What else holds for sharded weights."""
    ids, plain = batch()[:2], prepared("kmeans")
    model = spread(prepared("kmeans"), "fsdp")
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    expected = plain.state_dict()
    same = [torch.equal(full[name], value) for name, value in expected.items() if rank == 0]
    layer = model.model.layers[0].mlp.up_proj
    messages = {}
    for name, work in (
        ("quantize", lambda: layer.weight_quantizer.quantize(layer.weight)),
        ("refresh", lambda: next(codebooks(model))[2].refresh(layer.weight)),
        ("initialize", lambda: layer.weight_quantizer.initialize(layer.weight)),
        ("convert", lambda: qat.convert(model)),
    ):
        try:
            work()
        except InputError as error:
            messages[name] = str(error)
    mixed = spread(prepared("kmeans"), "fsdp", mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    for name, parameter in plain.named_parameters():
        if "quantizer" not in name:
            parameter.data = parameter.data.bfloat16()
    losses = [float(m(input_ids=ids, labels=ids, use_cache=False).loss) for m in (mixed, plain)]
    return {"same state": same, "messages": messages, "bf16": losses}


@pytest.fixture(scope="module")
def two_processes():
    return in_two_processes(differences)


@pytest.mark.parametrize(("scheme", "parallel", "how"), CASES)
def test_two_processes_with_half_a_batch_each(two_processes, scheme, parallel, how):
    assert two_processes[scheme, parallel, how] < 1e-5


def test_a_sharded_model_has_the_state_of_a_whole_one(two_processes):
    assert len(two_processes["same state"]) > 20
    assert all(two_processes["same state"])


@pytest.mark.parametrize("what", ["quantize", "refresh", "initialize", "convert"])
def test_shards_are_refused_where_the_whole_weight_is_needed(two_processes, what):
    assert "sharded by FSDP2" in two_processes["messages"][what]


def test_a_mesh_of_two_dimensions_is_refused():
    with pytest.raises(InputError, match="The mesh has 2 dimensions"):
        qat.transforms.shard(prepared("lsq"), mesh=SimpleNamespace(ndim=2))


def test_scales_and_codebooks_stay_float32_where_weights_are_cast(two_processes):
    sharded, plain = two_processes["bf16"]
    assert sharded == plain


@pytest.mark.slow
def test_two_devices_train_what_one_does_with_both_batches(tmp_path, tiny_folder, text_file):
    """Towards a teacher, which each device has."""
    shell = Shell(tmp_path, tiny_folder, text_file)
    common = ("trainer.max_steps=3", "scheme=w4a8", "optimizer.lr=1e-4", "method=distill")
    output = shell.run(*common, "data.batch_size=4", "trainer.devices=2", "trainer.strategy=ddp", "hydra.run.dir=two")
    assert output.count("after training, fake-quantized: perplexity") == 1
    shell.run(*common, "data.batch_size=8", "hydra.run.dir=one", forks=True)
    one, two = (weights(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert (tmp_path / "two" / "native" / "model.safetensors").is_file()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=2e-5)


@pytest.mark.slow
def test_two_devices_share_the_work_of_a_teacher(tmp_path, tiny_folder, text_file):
    """Each computes a part of its logits, and finds its own windows."""
    shell = Shell(tmp_path, tiny_folder, text_file)
    common = ("method=distill", "trainer.max_steps=3", "distill.top_k=8", "distill.cache_dtype=float32")
    two = ("trainer.devices=2", "trainer.strategy=ddp", "distill.cache=logits", "data.batch_size=4")
    output = shell.run(*common, *two, "hydra.run.dir=two")
    assert output.count("its logits for 24 windows") == 1
    assert np.load(tmp_path / "logits" / "done.npy").sum() == 24
    shell.run(*common, "data.batch_size=8", "hydra.run.dir=one", forks=True)
    one, two = (weights(tmp_path / name) for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=2e-5)
