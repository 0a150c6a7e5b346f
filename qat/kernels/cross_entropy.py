"""The cross entropy of a linear layer's outputs, without ever holding all of them."""

from torch import Tensor

from qat.kernels.linear_loss import kernels, linear_loss


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    chunk: int,
    scale: float = 1.0,
    softcap: float | None = None,
    ignored: int = -100,
) -> Tensor:
    """sum_i -log softmax(z_i)[target_i] with z = scale * (x W^T + b), or softcap * tanh(z / softcap).

    The logits of a chunk become the softmax, minus one at the target, which is their gradient; see `linear_loss`.
    Softmax and sums are in float32.

    Args:
        x: `[tokens, in]`.
        weight: `[vocabulary, in]`.
        bias: `[vocabulary]` or None.
        targets: `[tokens]`, indices of the vocabulary.
        chunk: how many tokens at a time.
        scale: multiplies the logits.
        softcap: bounds them; None does not.
        ignored: tokens with this target count nothing.

    Returns:
        The sum over all tokens that count, float32.
    """

    def loss(z: Tensor, rows: slice, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
        found: tuple[Tensor, Tensor | None]
        found = kernels(z).loss_and_gradient(z, targets[rows], scale, softcap, ignored, with_gradient)
        return found

    return linear_loss(x, weight, bias, chunk, loss)
