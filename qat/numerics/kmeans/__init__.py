"""One-dimensional k-means for many rows at once: exact where it is affordable, close to exact everywhere."""

from qat.numerics.kmeans.entropy import equal_mass_1d
from qat.numerics.kmeans.fit import kmeans_1d
from qat.numerics.kmeans.lloyd import lloyd
from qat.numerics.kmeans.moments import Moments, moments_of
from qat.numerics.kmeans.optimal import optimal_kmeans_1d

__all__ = ["Moments", "equal_mass_1d", "kmeans_1d", "lloyd", "moments_of", "optimal_kmeans_1d"]
