"""How long k-means takes to fit a codebook to every output channel of every linear layer of SmolLM2-135M.

python -m benchmarks.kmeans_init                 writes results/kmeans_init.json
"""

import time
from functools import partial

import torch

import qat
from benchmarks.record import record
from lightning_modules.models import load_smollm2
from qat.export.artifact import bits_per_weight
from qat.numerics.metrics import sqnr
from qat.quantizers import KMeansQuantizer
from qat.transforms import quant_layers


def main() -> None:
    """Fit 2, 3 and 4 bits."""
    rows = []
    for bits in (2, 3, 4):
        model = load_smollm2("~/.cache/lightning-qat").model
        start = time.perf_counter()
        qat.prepare(model, qat.Scheme(weight=partial(KMeansQuantizer, bits=bits)))
        seconds = time.perf_counter() - start
        with torch.no_grad():
            ratios = [sqnr(layer.weight, layer.weight_quantizer(layer.weight)) for _, layer in quant_layers(model)]
        rows.append(
            {
                "scheme": f"kmeans{bits}-row",
                "model": "smollm2",
                "seconds": seconds,
                "mean_sqnr_db": sum(ratios) / len(ratios),
                "bits_per_weight": bits_per_weight(model),
            }
        )
        print(rows[-1])
    record("kmeans_init", "python -m benchmarks.kmeans_init", rows)


if __name__ == "__main__":
    main()
