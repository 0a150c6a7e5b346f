"""Which quantizers suit which tensor: a weight, an activation, keys and values, or a gradient."""

from qat.errors import InputError
from qat.nn import StoredActivation
from qat.numerics.granularity import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from qat.quantizers import Quantizer


def check_weight(quantizer: Quantizer) -> None:
    """Refuse a quantizer whose codes would not be those that trained."""
    _check_rounding(quantizer)


def check_activation(quantizer: Quantizer) -> None:
    """Refuse a quantizer of an input or output that is not stored as it trains, or whose scales say nothing later.

    Scales lie within a token, or hold for every token there will be; but for those that are dynamic and `per_tensor`,
    which span the tokens of a call, a whole text's or a single one's, and are taken for their cheapness.
    """
    _check_rounding(quantizer)
    _check_single_codes(quantizer, instead="minmax_token")
    _check_storable(quantizer, "activations")
    granularity, dynamic = quantizer.granularity, quantizer.rule is not None
    if dynamic and granularity == PerChannel(-1):
        raise InputError(
            "a dynamic scale per_channel_-1 would span the tokens of a call, of which generation has one; take "
            "per_token or per_group_N, or a static quantizer (minmax_static)."
        )
    if not _suits_activations(granularity):
        raise InputError(
            f"{granularity} would group different texts or tokens of a batch; activations take per_token, per_tensor, "
            "per_group_N, or per_channel_-1 if they are static."
        )


def check_cached(quantizer: Quantizer) -> None:
    """Refuse a quantizer of keys or values that the cache cannot store, or whose scales would see later tokens."""
    _check_rounding(quantizer)
    _check_single_codes(quantizer, instead="minmax_token")
    dynamic = quantizer.rule is not None
    if dynamic and not isinstance(quantizer.granularity, PerToken | PerGroup | PerBlock):
        raise InputError(
            f"a dynamic scale {quantizer.granularity} would depend on later tokens; take per_token, per_group_N or "
            "per_block_32x1, or a static quantizer."
        )
    _check_storable(quantizer, "keys and values")


def check_gradient(quantizer: Quantizer) -> None:
    """Refuse a quantizer of gradients that has to be fitted first, or that mixes tokens channel by channel."""
    _check_single_codes(quantizer, instead="grad_token")
    if not quantizer.initialized or any(True for _ in quantizer.parameters()):
        raise InputError(
            "a static or learned quantizer cannot follow gradients, which shrink as training goes on: take a dynamic "
            "one that rounds at random (grad_token)."
        )
    if not isinstance(quantizer.granularity, PerToken | PerTensor | PerGroup):
        raise InputError(f"gradients take per_token, per_tensor or per_group_N, not {quantizer.granularity}.")


def _check_rounding(quantizer: Quantizer) -> None:
    if quantizer.stochastic:
        raise InputError(
            "random rounding is for gradients, since what ships must be what trained; set rounding=nearest."
        )


def _check_single_codes(quantizer: Quantizer, instead: str) -> None:
    if quantizer.format.block > 1:
        raise InputError(f"vector codebooks ({quantizer.format.name}) are for weights; take {instead}.")


def _check_storable(quantizer: Quantizer, what: str) -> None:
    """Refuse a quantizer whose qparams for `what` follow neither from stored numbers nor from a rule with a name.

    Nor may scales be quantized themselves: StoredActivation refuses that.
    """
    if quantizer.rule is None and quantizer.initialized:
        raise InputError(
            f"{type(quantizer).__name__} is for weights: no named rule finds its scales anew for {what}; take mxfp4 or "
            "minmax_token."
        )
    if quantizer.rule is None and quantizer.granularity not in (PerTensor(), PerChannel(-1)):
        raise InputError(
            f"a static or learned quantizer of {what} needs granularity per_tensor or per_channel_-1, not "
            f"{quantizer.granularity}; or take a dynamic one (minmax_token)."
        )
    if quantizer.initialized:
        StoredActivation.from_quantizer(quantizer)


def _suits_activations(granularity: Granularity) -> bool:
    """Whether its groups lie within a token, or hold everything, or a feature of all tokens."""
    return isinstance(granularity, PerToken | PerTensor | PerGroup) or granularity == PerChannel(-1)
