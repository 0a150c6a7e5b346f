"""Rotations that spread every channel over all others: Hadamard matrices, and orthogonal ones where there is none.

A Hadamard matrix of order n holds +-1 and has orthogonal rows. Orders double by Sylvester's construction and start, for
primes q, at q + 1 (Paley's first, q = 3 mod 4) or 2 (q + 1) (his second, q = 1 mod 4): R. E. A. C. Paley, On orthogonal
matrices, Journal of Mathematics and Physics 12, 1933.
"""

import math

import torch
from torch import Tensor

_TWO = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)


def hadamard(order: int) -> Tensor | None:
    """A Hadamard matrix `[order, order]` of +-1 in float64, or None where these constructions know none."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    found = _paley(order)
    if found is not None or order % 2:
        return found
    half = hadamard(order // 2)
    return None if half is None else torch.kron(_TWO, half)


def rotation(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix `[size, size]` in float64: a Hadamard matrix with random signs, over sqrt(size).

    Every entry is +-1 / sqrt(size), so no channel keeps an outlier (QuIP#, arXiv 2402.04396). Where no Hadamard matrix
    of this size is known, the Kronecker product of the largest that divides it with a random orthogonal matrix.
    """
    known, matrix = _largest(size)
    if known < size:
        rest = orthogonal(size // known, generator).contiguous() * math.sqrt(size // known)
        matrix = torch.kron(matrix, rest)
    signs = torch.randint(0, 2, (size, 1), generator=generator) * 2.0 - 1
    return signs * matrix / math.sqrt(size)


def orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix `[size, size]` in float64, all of them equally likely (arXiv math-ph/0609050)."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return q * r.diagonal().sign()


def mean_keeping(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix `[size, size]` in float64 that maps the vector of ones to itself.

    What it rotates keeps its mean over the channels, so it commutes with a LayerNorm too.
    """
    bases = []
    for _ in range(2):
        start = torch.randn(size, size, dtype=torch.float64, generator=generator)
        start[:, 0] = 1
        q, r = torch.linalg.qr(start)
        bases.append(q * r.diagonal().sign())
    return bases[0] @ bases[1].T


def cayley_step(matrix: Tensor, gradient: Tensor, rate: float, keep_mean: bool = False) -> Tensor:
    """One step of gradient descent on orthogonal matrices (Cayley SGD, arXiv 2002.01113).

    Y = (I + a/2 A)^-1 (I - a/2 A) X, with A the skew-symmetric half of G X^T, so that Y is orthogonal as X is.

    Args:
        matrix: X, orthogonal, `[size, size]`.
        gradient: G, of the loss to X.
        rate: a; less where A is so large that the step would no longer be one downhill, at 1 / |A|.
        keep_mean: leave the vector of ones where X maps it to.
    """
    x, g = matrix.double(), gradient.double()
    skew = (g @ x.T - x @ g.T) / 2
    if keep_mean:
        skew = skew - skew.mean(0, keepdim=True)
        skew = skew - skew.mean(1, keepdim=True)
    half = min(rate, 1 / (float(skew.norm()) + 1e-8)) / 2 * skew
    one = torch.eye(len(x), dtype=x.dtype, device=x.device)
    return torch.linalg.solve(one + half, (one - half) @ x).to(matrix.dtype)


def _largest(size: int) -> tuple[int, Tensor]:
    """The largest order of a Hadamard matrix that divides `size`, and the matrix."""
    orders = (order for order in range(size, 0, -1) if size % order == 0)
    return next((order, matrix) for order in orders if (matrix := hadamard(order)) is not None)


def _paley(order: int) -> Tensor | None:
    """The matrix of `order` from the quadratic residues modulo a prime; 2 is the smallest."""
    if order == 2:
        return _TWO
    if order % 4:
        return None
    if _is_prime(order - 1):  # the order divides by 4, so this prime is 3 modulo 4
        return torch.eye(order, dtype=torch.float64) + _conference(order - 1, -1)
    prime = order // 2 - 1
    if not _is_prime(prime) or prime % 4 != 1:
        return None
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(_conference(prime, 1), _TWO) + torch.kron(torch.eye(prime + 1, dtype=torch.float64), diagonal)


def _conference(prime: int, sign: int) -> Tensor:
    """Legendre symbols of differences with a border of ones, `[prime + 1, prime + 1]`; C^T = sign C, zero diagonal."""
    residues = torch.full((prime,), -1.0, dtype=torch.float64)
    residues[torch.arange(1, prime) ** 2 % prime] = 1
    residues[0] = 0
    index = torch.arange(prime)
    matrix = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    matrix[1:, 1:] = residues[(index[:, None] - index[None]) % prime]
    matrix[0, 0], matrix[1:, 0] = 0, sign
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
