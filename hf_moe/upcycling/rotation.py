"""Key heads mixed across groups, frequency by frequency, so that rotary energy gathers in few pairs.

A head's rotary numbers are F complex ones, k_f = a_f + i·b_f, and RoPE multiplies each by exp(i·ω_f·position). Any
complex matrix over the G heads of one frequency commutes with that:

    k_f = out_f z_f      z_f = into_f k_f      score = Re Σ_f conj(q_f) k_g(h),f = Re Σ_fj conj(q'_fj) z_fj
    q'_fj = conj(out_f[g(h), j]) q_f           into_f = out_f⁻¹

so scores stay the same with one key z of F·G pairs that all heads share. `gather` takes the directions in which the
keys matter most: eigenvectors of S^½ K S^½, K the keys' covariance and S what an error of each head costs.

Letters: H heads, G key groups, F frequencies, J = F·G rotary pairs, D hidden.
Source: arXiv:2502.07864 (principal components of keys across heads commute with RoPE); the weighing is this project's.
"""

from dataclasses import dataclass

import torch

# Of the largest eigenvalue of a metric: directions below it count as free, and may not be divided by.
_FLOOR = 1e-10


@dataclass(frozen=True)
class Rotation:
    """`out` and its inverse `into`, complex (F, G, G)."""

    out: torch.Tensor
    into: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """F and G."""
        return self.out.shape[0], self.out.shape[1]


def as_pairs(x: torch.Tensor, heads: int, dim: int = -1) -> torch.Tensor:
    """Complex numbers (…, heads, F, …) of heads · 2F real ones at `dim`: a head's first half and its second."""
    real, imaginary = x.unflatten(dim, (heads, 2, -1)).unbind(dim - 1 if dim < 0 else dim + 1)
    return torch.complex(real.contiguous(), imaginary.contiguous())


def as_halves(z: torch.Tensor) -> torch.Tensor:
    """Real numbers (2n, …) of n complex ones: first the real parts, then the imaginary."""
    return torch.cat([z.real, z.imag])


def interleaved(z: torch.Tensor) -> torch.Tensor:
    """Real numbers (…, 2n) of n complex ones, each pair side by side."""
    return torch.view_as_real(z.resolve_conj()).flatten(-2)


def unrotated(frequencies: int, groups: int, device: torch.device) -> Rotation:
    """Every head by itself."""
    eye = torch.eye(groups, dtype=torch.complex128, device=device).expand(frequencies, -1, -1).clone()
    return Rotation(eye, eye.clone())


def gather(covariance_FGG: torch.Tensor, metric_FGG: torch.Tensor) -> Rotation:
    """The rotation whose pairs are sorted by covariance · metric, largest first.

    Args:
        covariance_FGG: E[k k*], complex128. metric_FGG: cost of an error e is e* S e; Hermitian, positive.
    """
    root, inverse = root_of(metric_FGG)
    vectors = torch.linalg.eigh(root @ covariance_FGG @ root).eigenvectors.flip(-1)
    out, into = inverse @ vectors, vectors.mH @ root
    # Pairs of about the keys' own size, so that 16-bit caches hold them as well as they did the keys.
    size = out.abs().square().sum(1, keepdim=True).sqrt()
    return Rotation(out / size, into * size.mT)


def root_of(metric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Square root of a positive Hermitian matrix, or of several, and the root's inverse."""
    values, vectors = torch.linalg.eigh(metric)
    root = values.clamp_min(torch.finfo(torch.float64).tiny).clamp_min(values[..., -1:] * _FLOOR).sqrt().unsqueeze(-2)
    return (vectors * root) @ vectors.mH, (vectors / root) @ vectors.mH


def shared_keys(rotation: Rotation, weight: torch.Tensor) -> torch.Tensor:
    """Rows of the pairs z, complex (J, …), from those of the keys (G·2F, …), weights or biases."""
    heads = as_pairs(weight.double(), rotation.shape[1], dim=0)
    return torch.einsum("fjg,gf...->fj...", rotation.into, heads).flatten(0, 1)


def counter_rotated(rotation: Rotation, weight: torch.Tensor, heads: int, pairs: torch.Tensor) -> torch.Tensor:
    """Rows of the queries (H, 2·len(pairs), …) that meet the chosen pairs of z, from those of the source (H·2F, …)."""
    groups = rotation.shape[1]
    group = torch.arange(heads, device=weight.device) * groups // heads
    frequency, component = pairs // groups, pairs % groups
    queries = as_pairs(weight.double(), heads, dim=0)[:, frequency]
    factor = rotation.out[frequency[None], group[:, None], component[None]].conj()
    turned = queries * factor.reshape(factor.shape + (1,) * (queries.dim() - 2))
    return torch.cat([turned.real, turned.imag], dim=1)
