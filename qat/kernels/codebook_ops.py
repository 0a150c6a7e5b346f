"""The operator that refreshes codebooks, `qat::lloyd_step`: PyTorch everywhere, Triton on CUDA."""

import torch
from torch import Tensor

from qat.kernels.codebook_means import reference

torch.library.define(
    "qat::lloyd_step",
    "(Tensor x, Tensor scale, Tensor codebook, Tensor? importance) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl("qat::lloyd_step", "default")(torch.no_grad()(reference.lloyd_step))
torch.library.register_fake("qat::lloyd_step", lambda x, scale, codebook, importance: torch.empty_like(codebook))


@torch.library.impl("qat::lloyd_step", "cuda")
def _on_cuda(x: Tensor, scale: Tensor, codebook: Tensor, importance: Tensor | None) -> Tensor:
    # Imported at the first call: `import qat` stays light, and machines without a GPU need no Triton.
    from qat.kernels.codebook_means import triton

    with torch.no_grad(), torch.cuda.device(x.device):
        return triton.lloyd_step(x, scale, codebook, importance)


def lloyd_step(x: Tensor, scale: Tensor, codebook: Tensor, importance: Tensor | None = None) -> Tensor:
    """Move each entry of a codebook to the mean of its members; see `qat.kernels.codebook_means.reference`.

    Args:
        x: the view `[groups, elements]`.
        scale: `[groups, 1]` float32.
        codebook: `[rows, entries]` float32, ascending.
        importance: weights of x, shaped like it; None weighs evenly.

    Returns:
        The new entries `[rows, entries]`, each in its place.
    """
    return torch.ops.qat.lloyd_step.default(x, scale, codebook, importance)
