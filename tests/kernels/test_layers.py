"""The small operations of the torch backend against formulas written out in float64."""

from __future__ import annotations

import math

import pytest
import torch

from engine.kernels import torch_linear, torch_norm
from engine.kernels.batch import Segment, StepBatch
from engine.kernels.params import KVPages, QKVLayout, RouteParams, SwigluParams
from engine.model.rope import rope_table

ACT = SwigluParams(alpha=1.702, limit=7.0, beta=1.0)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_gemma_norm_uses_the_gain_as_given() -> None:
    x, gain = randn(5, 32), randn(32, seed=1)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain.double()
    torch.testing.assert_close(torch_norm.rms_norm(x, gain, 1e-6).double(), expected, atol=1e-6, rtol=1e-5)
    residual = randn(5, 32, seed=2)
    normed, total = torch_norm.add_rms_norm(x, residual, gain, 1e-6)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, torch_norm.rms_norm(x + residual, gain, 1e-6))


def test_swiglu_clamps_gate_above_only_and_up_on_both_sides() -> None:
    values = torch.tensor([-50.0, -7.5, -1.0, 0.0, 2.0, 7.5, 50.0])
    gate, up = torch.meshgrid(values, values, indexing="ij")
    expected = []
    for g, u in zip(gate.flatten().tolist(), up.flatten().tolist(), strict=True):
        g, u = min(g, 7.0), max(-7.0, min(u, 7.0))
        expected.append((u + 1.0) * g / (1.0 + math.exp(-1.702 * g)))
    packed = torch.cat((gate.reshape(1, -1), up.reshape(1, -1)), dim=-1)
    torch.testing.assert_close(torch_linear.swiglu(packed, ACT)[0], torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_router_bias_chooses_but_does_not_weigh() -> None:
    x, gate = randn(6, 16), randn(5, 16, seed=1)
    bias = torch.tensor([3.0, 0.0, 0.0, 0.0, 0.0])
    weights, ids = torch_linear.route(x, torch_linear.pack_linear(gate), bias, RouteParams(2, 2.0, False))
    scores = torch.sigmoid(x.double() @ gate.double().t())
    for row in range(6):
        chosen = sorted(range(5), key=lambda e: (-(scores[row, e] + bias[e]).item(), e))[:2]
        assert ids[row].tolist() == chosen
        assert chosen[0] == 0  # the bias put expert 0 first everywhere
        expected = 2.0 * scores[row, chosen] / scores[row, chosen].sum()
        torch.testing.assert_close(weights[row].double(), expected, atol=1e-6, rtol=1e-5)


def test_router_ties_go_to_the_lower_expert() -> None:
    gate, params = torch_linear.pack_linear(randn(6, 8)), RouteParams(3, 1.0, False)
    _, ids = torch_linear.route(torch.zeros(3, 8), gate, torch.zeros(6), params)
    assert ids.tolist() == [[0, 1, 2]] * 3


@pytest.mark.parametrize("num_tokens", [1, 3, 33, 100])
def test_experts(num_tokens: int) -> None:
    hidden, width, num_experts, top_k = 16, 24, 5, 2
    x = randn(num_tokens, hidden)
    w13, w2 = randn(num_experts, 2 * width, hidden, seed=1), randn(num_experts, hidden, width, seed=2)
    weights = randn(num_tokens, top_k, seed=3).abs()
    ids = torch.stack(
        [torch.randperm(num_experts, generator=torch.Generator().manual_seed(i))[:top_k] for i in range(num_tokens)]
    )
    out = torch_linear.experts(x, torch_linear.pack_experts(w13, w2), weights, ids, ACT)
    expected = torch.zeros(num_tokens, hidden, dtype=torch.float64)
    for token in range(num_tokens):
        for weight, expert in zip(weights[token].tolist(), ids[token].tolist(), strict=True):
            gate_up = w13[expert].double() @ x[token].double()
            gate, up = gate_up[:width].clamp(max=7.0), gate_up[width:].clamp(-7.0, 7.0)
            expected[token] += weight * (w2[expert].double() @ ((up + 1) * gate * torch.sigmoid(1.702 * gate)))
    torch.testing.assert_close(out.double(), expected, atol=1e-3, rtol=1e-4)


def test_linear_rows_do_not_depend_on_the_batch() -> None:
    packed = torch_linear.pack_linear(randn(96, 64))
    x = randn(70, 64, seed=1)
    together = torch_linear.linear(x, packed)
    for count in (1, 2, 3, 16, 17, 64):
        assert torch.equal(torch_linear.linear(x[:count].contiguous(), packed), together[:count])


def test_norm_rope_insert() -> None:
    """Each head normed by its own gain, only rotary_dim dims turned, in pairs half a rotary_dim apart; v untouched."""
    layout = QKVLayout(4, 2, 32, 2, 24, rotary_dim=16, eps=1e-6)
    positions = torch.tensor([0, 1, 127, 128, 300])
    table = torch.tensor([[2, 0, 1]], dtype=torch.int32)
    count = len(positions)
    batch = StepBatch(
        positions=positions,
        slot_mapping=table[0][positions // 128].long() * 128 + positions % 128,
        row_ids=torch.zeros(count, dtype=torch.int64),
        block_table=table,
        seq_lens=torch.tensor([301], dtype=torch.int32),
        query_start_loc=torch.tensor([0, count], dtype=torch.int32),
        query_starts=[0, count],
        seq_lens_host=[301],
        segments=(Segment("prefill", 0, 1, 0, count),),
    )
    pages = KVPages(torch.zeros(3, 2, 128, 32), torch.zeros(3, 2, 128, 32), torch.zeros(3, 128, 24))
    qkv = randn(count, sum(layout.sizes))
    gains = (randn(32, seed=1), randn(32, seed=2), randn(24, seed=3), randn(24, seed=4))
    packed = tuple(
        torch.cat((gains[i].expand(heads, -1), gains[i + 1].expand(keys, -1)))
        for i, heads, keys in ((0, 4, 2), (2, 2, 1))
    )
    q, index_q = torch_norm.qk_norm_rope_insert(qkv, packed, rope_table(512, 16, 10000.0), batch, layout, pages)
    parts = qkv.double().split(layout.sizes, dim=-1)

    def expected(part: torch.Tensor, gain: torch.Tensor, token: int) -> torch.Tensor:
        heads = part[token].view(-1, len(gain))
        heads = heads / (heads.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain.double()
        out = heads.clone()
        for d in range(8):
            angle = positions[token].double() * 10000.0 ** (-2 * d / 16)
            low, high = heads[:, d], heads[:, d + 8]
            out[:, d] = low * angle.cos() - high * angle.sin()
            out[:, d + 8] = high * angle.cos() + low * angle.sin()
        return out

    for token in range(count):
        page, offset = int(table[0, positions[token] // 128]), int(positions[token] % 128)
        close = {"atol": 1e-5, "rtol": 1e-4}
        torch.testing.assert_close(q[token].double(), expected(parts[0], gains[0], token), **close)
        torch.testing.assert_close(pages.k[page, :, offset].double(), expected(parts[1], gains[1], token), **close)
        assert torch.equal(pages.v[page, :, offset].reshape(-1), qkv[token, 192:256])
        assert index_q is not None
        torch.testing.assert_close(index_q[token].double(), expected(parts[3], gains[2], token), **close)
        torch.testing.assert_close(
            pages.index_k[page, offset].double(), expected(parts[4], gains[3], token)[0], **close
        )
    assert (pages.k != 0).any(-1).sum() == count * 2  # nothing else was written
