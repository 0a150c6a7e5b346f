"""Costs from the codes alone: more bits where the information is. Needs no data."""

from collections.abc import Mapping

from qat.numerics.metrics import code_entropy
from qat.numerics.qtensor import QuantizedTensor
from qat.planning.candidates import Candidate, PlannedLayer
from qat.planning.rounding import quantized


def entropy(layer: PlannedLayer, candidates: Mapping[str, Candidate]) -> dict[str, float]:
    """n (4^(H_max - H) - 1) for each candidate: the noise of codes that carry H bits a weight, beyond the least.

    H is the Shannon entropy of a candidate's codes, H_max that of the candidate whose codes carry most, n the number
    of weights. A code of H bits leaves noise in proportion to 4^-H (6 dB a bit, the rate of entropy-coded uniform
    grids: Gish and Pierce, 1968). Layers whose weights fill the grid evenly lose most by a shorter code; where a few
    large weights stretch it, codes carry little either way. What errors do to the loss is not in it.
    """
    carried = {
        name: sum(_information(q) for q in quantized(layer, candidate).values()) / layer.weights
        for name, candidate in candidates.items()
    }
    most = max(carried.values(), default=0.0)
    return {name: layer.weights * (4 ** (most - bits) - 1) for name, bits in carried.items()}


def _information(q: QuantizedTensor) -> float:
    """Bits that the codes of `q` carry."""
    return float(code_entropy(q).mean()) * q.codes.numel()
