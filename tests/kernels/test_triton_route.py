"""The router of the triton backend against float64, and against itself in other batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels import torch_linear, triton_route
from engine.kernels.params import RouteParams
from tests.kernels.devices import DEVICE, ON_GPU, TARGET


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(x: Tensor, gate: Tensor, bias: Tensor, params: RouteParams) -> tuple[Tensor, Tensor]:
    """Routes on the device and compares with float64; (weights, ids) on the CPU."""
    weights, ids = (
        out.cpu() for out in triton_route.route(TARGET, x.to(DEVICE), gate.to(DEVICE), bias.to(DEVICE), params)
    )
    assert weights.dtype == torch.float32 and ids.dtype == torch.int32
    assert weights.shape == ids.shape == (len(x), params.width)
    scores = torch.sigmoid(x.double() @ gate.double().t())
    routed = ids[:, : params.top_k].long()
    # By rank, each at least as good as all that were left, up to the rounding of the logits.
    choice = scores + bias.double()
    taken = choice.gather(1, routed)
    assert (taken[:, :-1] >= taken[:, 1:] - 1e-5).all()
    assert (taken[:, -1:] >= choice.scatter(1, routed, -torch.inf) - 1e-5).all()
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    expected = scores.gather(1, routed)
    expected = expected * (params.scale / expected.sum(1, keepdim=True))
    torch.testing.assert_close(weights[:, : params.top_k].double(), expected, atol=1e-5, rtol=1e-4)
    if params.shared:
        assert (weights[:, -1] == 1.0).all() and (ids[:, -1] == len(gate)).all()
    return weights, ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [1, 3, 33])
@pytest.mark.parametrize(
    ("num_experts", "hidden", "params"),
    [
        (8, 64, RouteParams(2, 2.0, True)),
        (6, 96, RouteParams(3, 1.0, False)),
        (20, 200, RouteParams(4, 2.5, True)),
    ],
)
def test_route(num_experts: int, hidden: int, params: RouteParams, num_tokens: int, dtype: torch.dtype) -> None:
    x, gate = randn(num_tokens, hidden).to(dtype), randn(num_experts, hidden, seed=1) / hidden**0.5
    bias = randn(num_experts, seed=2) * 0.3
    _, ids = check(x, gate, bias, params)
    if dtype == torch.float32:
        assert torch.equal(ids.long(), torch_linear.route(x, torch_linear.pack_linear(gate), bias, params)[1])


def test_bias_chooses_but_does_not_weigh() -> None:
    bias = torch.tensor([5.0, 0.0, 0.0, 0.0, -5.0])
    _, ids = check(randn(4, 32), randn(5, 32, seed=1), bias, RouteParams(2, 2.0, False))
    assert (ids[:, 0] == 0).all() and (ids != 4).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_go_to_the_lower_expert(dtype: torch.dtype) -> None:
    params = RouteParams(3, 1.0, False)
    _, ids = check(torch.zeros(3, 64, dtype=dtype), randn(6, 64), torch.zeros(6), params)
    assert ids.tolist() == [[0, 1, 2]] * 3
    # Negative choices, some of them equal.
    bias = torch.tensor([-3.0, -2.0, -3.0, -2.0, -2.5, -3.0])
    assert check(torch.zeros(1, 64, dtype=dtype), randn(6, 64), bias, params)[1].tolist() == [[1, 3, 4]]


def test_weights_count_to_the_last_bit() -> None:
    """Where rounding the weights to bf16, or to two bf16 parts, would show."""
    gate = torch.zeros(4, 64)
    gate[:, 0] = torch.tensor([1.0, 1.0 - 2.0**-20, 1.0 - 2.0**-22, 1.0 + 2.0**-21]) * 0.5
    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    x[0, 0] = -8.0
    assert check(x, gate, torch.zeros(4), RouteParams(3, 1.0, False))[1].tolist() == [[1, 2, 0]]


def test_tokens_do_not_depend_on_their_batch() -> None:
    x, gate, bias = randn(70, 192).bfloat16().to(DEVICE), randn(8, 192, seed=1).to(DEVICE), torch.zeros(8).to(DEVICE)
    weights, ids = triton_route.route(TARGET, x, gate, bias, RouteParams(2, 2.0, True))
    for count in (1, 5, 17):
        some_weights, some_ids = triton_route.route(TARGET, x[:count], gate, bias, RouteParams(2, 2.0, True))
        assert torch.equal(some_weights, weights[:count]) and torch.equal(some_ids, ids[:count])


def test_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_route, "_MANY_TOKENS", 1)
    check(randn(40, 96).bfloat16(), randn(20, 96, seed=1) / 10, randn(20, seed=2), RouteParams(4, 2.0, True))


def test_nan_gives_experts_that_exist() -> None:
    gate, bias = randn(6, 64, seed=1).to(DEVICE), torch.zeros(6).to(DEVICE)
    x = torch.full((2, 64), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    weights, ids = triton_route.route(TARGET, x, gate, bias, RouteParams(3, 1.0, False))
    assert weights.isnan().all()
    assert ids.cpu().sort().values.min() >= 0 and ids.max() < 6
    assert all(len(set(row)) == 3 for row in ids.tolist())


@pytest.mark.skipif(not ON_GPU, reason="slow in the interpreter")
@pytest.mark.parametrize("num_tokens", [1, 16, 64, 300, 3001])
def test_route_of_the_model(num_tokens: int) -> None:
    x, gate = randn(num_tokens, 6144).bfloat16(), randn(128, 6144, seed=1) / 6144**0.5
    check(x, gate, randn(128, seed=2) * 0.1, RouteParams(4, 2.0, True))
