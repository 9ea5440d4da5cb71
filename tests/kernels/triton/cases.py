"""What the kernel tests share: the named cases, drawn shapes, inputs, and the one rule for errors."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies the bits of bfloat16 operands as integers.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16} | ({"bf16": torch.bfloat16} if DEVICE == "cuda" else {})
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16


@dataclass(frozen=True)
class Shape:
    T: int
    D: int
    F: int
    E: int
    K: int
    # "uniform", "one" (all to one expert), "gap" (expert 0 gets nothing), "sentinels" (some routes have no expert)
    routes: str = "uniform"


NAMED = {
    "plain": Shape(24, 32, 16, 4, 2),
    "an empty expert": Shape(20, 32, 16, 4, 2, "gap"),
    "all tokens to one expert": Shape(19, 32, 16, 4, 1, "one"),
    "T=0": Shape(0, 32, 16, 4, 2),
    "T=1": Shape(1, 32, 16, 4, 2),
    "N off the block size": Shape(37, 40, 24, 3, 1),
    "E not a power of two": Shape(17, 32, 16, 5, 3),
    "K=1": Shape(18, 32, 16, 4, 1),
    "K=E": Shape(9, 32, 16, 3, 3),
    "sentinels": Shape(15, 32, 16, 4, 2, "sentinels"),
    "no 16-byte rows": Shape(11, 33, 17, 3, 2),
    "more than one block": Shape(70, 40, 24, 2, 2),
}

shapes = st.builds(
    lambda T, D, F, E, K, routes: Shape(T, D, F, E, min(K, E), routes),
    st.integers(0, 40),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(1, 4),
    st.sampled_from(["uniform", "one", "gap", "sentinels"]),
)


def index(shape: Shape, seed: int = 0) -> torch.Tensor:
    make = torch.Generator().manual_seed(seed)
    scores = torch.rand((shape.T, shape.E), generator=make)
    if shape.routes == "one":
        scores[:, shape.E // 2] = 2
    if shape.routes == "gap" and shape.K < shape.E:
        scores[:, 0] = -1
    found = scores.argsort(1, descending=True)[:, : shape.K]
    if shape.routes == "sentinels":
        found = torch.where(torch.rand(found.shape, generator=make) < 0.4, shape.E, found)
    return found.to(DEVICE)


def normal(*size: int, dtype=torch.float32, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    make = torch.Generator().manual_seed(hash((size, seed)) % 2**31)
    return (torch.randn(size, generator=make) * scale).to(DEVICE, dtype)


def poison() -> None:
    """Leave NaN where the next allocations may land, so that an element nobody writes shows."""
    for size in (64, 1024, 4096, 16384, 65536):
        blocks = [torch.full((size,), float("nan"), device=DEVICE) for _ in range(8)]
        del blocks


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return ((found.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30)).item()


def assert_as_good(found: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, what: str = "") -> None:
    """The error may be twice that of plain PyTorch in the same dtype, plus an eighth of the dtype's step and 1e-6."""
    assert found.shape == truth.shape, what
    assert found.dtype == plain.dtype, what
    if truth.numel() == 0:
        return
    if not truth.any():
        assert not found.any(), f"{what}: must be exactly zero"
        return
    bound = 2 * error(plain, truth) + torch.finfo(plain.dtype).eps / 8 + 1e-6
    assert error(found, truth) <= bound, f"{what}: error {error(found, truth):.2e} over {bound:.2e}"
