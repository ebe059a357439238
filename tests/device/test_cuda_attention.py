"""Attention of one new token in one launch, against float64, on a GPU.

Tolerance: a weight of the softmax is rounded to the type (a relative error of at most eps / 2, spread eps / sqrt(12)),
and so is the result; scores are sums of exact products in float32. Errors of weights are independent, so relative to
the norm of the result they stay near eps / sqrt(12), too. Four times both together is allowed.
"""

import pytest
import torch

from qpalette.backends.cuda.attend import attend, attends

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def inputs(batch: int, heads: int, key_heads: int, length: int, dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    query = torch.randn(batch, 1, heads, dim, device="cuda").to(dtype).transpose(1, 2)
    key, value = (torch.randn(batch, key_heads, length, dim, device="cuda").to(dtype) for _ in range(2))
    return [query, key, value, torch.rand(batch, 1, 1, length, device="cuda") < 0.7]


def expected(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    group = query.shape[1] // key.shape[1]
    key, value = (cache.double().repeat_interleave(group, 1) for cache in (key, value))
    scores = query.double() @ key.transpose(2, 3) * scale
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [(1, 32, 8, 1152, 128), (3, 28, 4, 77, 128), (2, 8, 8, 5000, 64), (1, 16, 2, 1, 256), (1, 5, 5, 1537, 192)],
    ids=str,
)
def test_equals_the_reference(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    query, key, value, mask = inputs(*shape, dtype)
    mask[..., -1] = True
    assert attends(query, key, value, mask)
    result, wanted = attend(query, key, value, mask, 0.2), expected(query, key, value, mask, 0.2)
    assert result.shape == wanted.shape
    tolerance = 4 * 2 * torch.finfo(dtype).eps / 12**0.5
    assert (result.double() - wanted).norm() <= tolerance * wanted.norm()
    assert torch.equal(result, attend(query, key, value, mask, 0.2)), "the same bits on every run"


def test_a_long_cache_that_is_nearly_empty_and_one_that_is_empty() -> None:
    query, key, value, mask = inputs(2, 8, 2, 9000, 128, torch.float16)
    mask[:] = False
    mask[0, ..., 8000:8003] = True
    result, wanted = attend(query, key, value, mask, 0.1), expected(query, key, value, mask, 0.1)
    assert (result[0].double() - wanted[0]).norm() <= 8 * 2**-10 / 12**0.5 * wanted[0].norm()
    assert not result[1].any()


def test_what_is_not_finite_stays_so() -> None:
    query, key, value, mask = inputs(1, 8, 2, 300, 128, torch.float16)
    mask[:] = True
    key[0, 1, 7, 5] = torch.nan
    result = attend(query, key, value, mask, 0.1)
    assert result[:, :, 4:].isnan().all()
    assert result[:, :, :4].isfinite().all()


def test_one_mask_for_all_and_strided_caches() -> None:
    query, key, value, mask = inputs(2, 8, 2, 300, 128, torch.float16)
    both = torch.stack([key.transpose(1, 2), value.transpose(1, 2)], dim=3)  # [B, L, heads, 2, D]
    strided = [both[:, :, :, i].transpose(1, 2) for i in range(2)]
    one = mask[:1]
    assert attends(query, *strided, one)
    assert torch.equal(attend(query, *strided, one, 0.1), attend(query, key, value, one.expand(2, -1, -1, -1), 0.1))


def test_a_cache_that_begins_anywhere() -> None:
    query, key, value, mask = inputs(1, 8, 2, 64, 128, torch.float16)
    elsewhere = torch.cat([key.new_zeros(4), key.flatten()])[4:].view_as(key)
    assert attends(query, elsewhere, value, mask)
    assert torch.equal(attend(query, elsewhere, value, mask, 0.1), attend(query, key, value, mask, 0.1))


def test_what_it_refuses() -> None:
    query, key, value, mask = inputs(1, 8, 2, 64, 128, torch.float16)
    assert not attends(query.float(), key.float(), value.float(), mask)
    assert not attends(query[..., :80], key[..., :80], value[..., :80], mask)
    assert not attends(query.expand(1, 8, 2, 128), key, value, mask)
    assert not attends(query, key, value, mask.half())
    assert not attends(query.cpu(), key.cpu(), value.cpu(), mask.cpu())


def test_the_operator_is_well_defined() -> None:
    query, key, value, mask = inputs(1, 8, 2, 64, 128, torch.float16)
    torch.library.opcheck(attend, (query, key, value, mask, 0.1))
