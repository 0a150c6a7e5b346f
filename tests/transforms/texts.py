"""Data and models that methods which look at activations are tested with."""

import torch


def batches(count=6, seed=0):
    """Texts in which some tokens are frequent, so that features hang together."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(0, 96 * 96, (count, 2, 32), generator=generator)
    return [{"input_ids": ids, "labels": ids} for ids in (draws.float().sqrt().long() % 96)]


def logits(model, data):
    """Of all of `data`, `[sequences, tokens, vocabulary]`."""
    with torch.no_grad():
        return torch.cat([model(input_ids=batch["input_ids"], use_cache=False).logits for batch in data])


def with_outliers(model, channels=(3, 17), factor=40.0):
    """`model`, the norms of which give every channel a gain of its own, and some a large one."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and ("norm" in name or "ln_" in name) and name.endswith("weight"):
            parameter.data.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
            if len(parameter) == model.config.hidden_size:
                parameter.data[list(channels)] *= factor
        elif parameter.ndim == 1:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def mean_error(model, data, full):
    """Mean squared error of the logits."""
    return float((logits(model, data) - full).square().mean())


def exact(model):
    """`model` in float64, and its experts in the implementation that computes in it."""
    model.config._experts_implementation = "eager"
    return model.double().eval()


def same_function(model, data, full):
    """Whether the logits are `full`, as exactly as float64 allows, or float32 where norms add 1 to their weights."""
    tolerance = 1e-5 if "Gemma" in type(model).__name__ else 1e-9
    return float((logits(model, data) - full).abs().max()) < tolerance * float(full.abs().max())
