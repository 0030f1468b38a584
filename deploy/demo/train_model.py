"""M3's text decoder with gradients: the same function as `engine.model`, over whole sequences and without pages.

Parameters are float32; products run in the dtype of the activations. All experts are computed and multiplied by their
routing weights, most of which are zero: for experts this small it costs less than sorting tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploy.demo.train_attention import Chosen, IndexSample, SparseAttention, attend_dense, index_loss, select
from deploy.demo.writer import Sizes
from engine.model.rope import rope_table

Z_LOSS = 1e-4
# Rows of logits that are held at once.
_HEAD_CHUNK = 16_384


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gemma RMS norm over the last dimension: in fp32, the gain is the weight plus one."""
    values = x.float()
    return (values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps) * (1 + weight)).to(x.dtype)


def _rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x: float32 [tokens, heads, dim].  cos_sin: float32 [tokens, rotary_dim]."""
    half = cos_sin.shape[-1] // 2
    cos, sin = cos_sin[:, None, :half], cos_sin[:, None, half:]
    low, high, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((low * cos - high * sin, high * cos + low * sin, rest), -1)


def _heads(x: Tensor, projection: Tensor, norm: Tensor, cos_sin: Tensor, eps: float) -> Tensor:
    """Project, norm per head, rotate: [tokens, hidden] -> [tokens, heads, dim]."""
    heads = F.linear(x, projection.to(x.dtype)).view(len(x), -1, len(norm))
    values = heads.float()
    values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps) * (1 + norm)
    return _rotate(values, cos_sin).to(x.dtype)


def _swiglu(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    """SwiGLU-OAI in float32."""
    gate = gate.float().clamp(max=limit)
    up = up.float().clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


def project(
    x: Tensor, norm: Tensor, weights: tuple[Tensor, ...], index_weights: tuple[Tensor, ...], cos_sin: Tensor, eps: float
) -> tuple[Tensor, ...]:
    """(q, k, v) and, where the layer has an indexer, (index_q, index_k): each [tokens, heads, dim].

    x: [tokens, hidden].  weights: q, k, v, q_norm, k_norm.  index_weights: index_q, index_k and their norms, or none.
    """
    q_proj, k_proj, v_proj, q_norm, k_norm = weights
    normed = rms_norm(x, norm, eps)
    v = F.linear(normed, v_proj.to(x.dtype)).view(len(x), -1, len(q_norm))
    out = (_heads(normed, q_proj, q_norm, cos_sin, eps), _heads(normed, k_proj, k_norm, cos_sin, eps), v)
    if not index_weights:
        return out
    index_q, index_k, index_q_norm, index_k_norm = index_weights
    seen = normed.detach()
    return (
        *out,
        _heads(seen, index_q, index_q_norm, cos_sin, eps),
        _heads(seen, index_k, index_k_norm, cos_sin, eps),
    )


def feed_dense(
    x: Tensor,
    attended: Tensor,
    o_proj: Tensor,
    norm: Tensor,
    weights: tuple[Tensor, ...],
    act: tuple[float, float],
    eps: float,
) -> Tensor:
    """The rest of a layer with a dense network. x: [tokens, hidden], attended: [tokens, heads * dim]."""
    x = x + F.linear(attended, o_proj.to(x.dtype))
    gate, up, down = (weight.to(x.dtype) for weight in weights)
    normed = rms_norm(x, norm, eps)
    hidden = _swiglu(F.linear(normed, gate), F.linear(normed, up), *act).to(x.dtype)
    return x + F.linear(hidden, down)


def feed_moe(
    x: Tensor,
    attended: Tensor,
    o_proj: Tensor,
    norm: Tensor,
    router: Tensor,
    bias: Tensor,
    weights: tuple[Tensor, ...],
    act: tuple[float, float],
    eps: float,
    top_k: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The rest of a layer with experts, the shared one last in `weights`: w1, w3, w2.

    Returns x and the number of tokens that each routed expert got, float32 [experts].
    """
    x = x + F.linear(attended, o_proj.to(x.dtype))
    w1, w3, w2 = (weight.to(x.dtype) for weight in weights)
    experts, width, hidden = w1.shape
    normed = rms_norm(x, norm, eps)
    scores = torch.sigmoid(F.linear(normed.float(), router))
    ids = (scores.detach() + bias).topk(top_k).indices
    chosen = torch.zeros_like(scores).scatter_(-1, ids, 1.0)
    kept = scores * chosen
    shares = F.pad(kept * (scale / kept.sum(-1, keepdim=True)), (0, 1), value=1.0)
    inner = _swiglu(F.linear(normed, w1.view(-1, hidden)), F.linear(normed, w3.view(-1, hidden)), *act)
    inner = (inner.view(-1, experts, width) * shares[..., None]).to(x.dtype).view(-1, experts * width)
    return x + inner @ w2.transpose(1, 2).reshape(-1, hidden), chosen.sum(0)


def head_loss(
    x: Tensor, norm: Tensor, head: Tensor, targets: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(sum of weight * loss, float32 [tokens]: nats per token). targets, weight: [tokens]."""
    logits = F.linear(rms_norm(x, norm, eps), head.to(x.dtype)).float()
    log_sum = logits.logsumexp(-1)
    nats = log_sum - logits.gather(-1, targets[:, None])[:, 0]
    return ((nats + Z_LOSS * log_sum.square()) * weight).sum(), nats.detach()


class Layer(nn.Module):
    """One decoder layer's parameters, float32."""

    def __init__(self, sizes: Sizes, sparse: bool, moe: bool) -> None:
        super().__init__()
        hidden, dim, index_dim = sizes.hidden_size, sizes.head_dim, sizes.index_dim
        self.sparse, self.moe = sparse, moe
        self.input_norm, self.post_norm = _zeros(hidden), _zeros(hidden)
        self.q, self.k, self.v = (_normal(n * dim, hidden) for n in (sizes.heads, sizes.kv_heads, sizes.kv_heads))
        self.o = _zeros(hidden, sizes.heads * dim)
        # Normed queries and keys bound the logits: with gain 1 a head cannot look at one key among thousands.
        self.q_norm, self.k_norm = _filled(dim, 0.25), _filled(dim, 0.25)
        if sparse:
            self.index_q = _normal(sizes.num_index_heads * index_dim, hidden, std=0.05)
            self.index_k = _normal(index_dim, hidden, std=0.05)
            self.index_q_norm, self.index_k_norm = _filled(index_dim, 0.25), _filled(index_dim, 0.25)
        if not moe:
            self.gate, self.up = _normal(sizes.dense_width, hidden), _normal(sizes.dense_width, hidden)
            self.down = _zeros(hidden, sizes.dense_width)
            return
        if sizes.shared_width != sizes.expert_width:
            raise ValueError(f"shared_width must be expert_width={sizes.expert_width}, got {sizes.shared_width}")
        experts = sizes.experts + 1
        self.router = _normal(sizes.experts, hidden)
        self.w1, self.w3 = (_normal(experts, sizes.expert_width, hidden) for _ in range(2))
        self.w2 = _zeros(experts, hidden, sizes.expert_width)
        self.bias: Tensor
        self.register_buffer("bias", torch.zeros(sizes.experts))


def _normal(*shape: int, std: float = 0.02) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * std)


def _zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def _filled(size: int, value: float) -> nn.Parameter:
    return nn.Parameter(torch.full((size,), value))


@dataclass
class Pass:
    """What a forward pass left behind.

    loss: weighted sum over the targets.  nats: float32 [batch * length].  kl: sum over layers, or 0.
    loads: float32 [moe layers, experts], tokens.  samples: of the layers whose indexer was trained.
    hidden: [batch, length, hidden], before the final norm.  chosen: per layer, where it attended to blocks.
    """

    loss: Tensor
    nats: Tensor
    kl: Tensor
    loads: Tensor
    hidden: Tensor
    samples: dict[int, IndexSample] = field(default_factory=dict)
    layer_kl: dict[int, Tensor] = field(default_factory=dict)
    chosen: dict[int, Chosen] = field(default_factory=dict)


class NanoModel(nn.Module):
    """The decoder. compiled: torch.compile the parts between the attentions, and block-sparse attention."""

    def __init__(self, sizes: Sizes, *, compiled: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.sizes, self.dtype = sizes, dtype
        # As wide as what the layers add to it, so that the first norms see tokens and not noise.
        self.embedding = _normal(sizes.vocab_size, sizes.hidden_size, std=0.5)
        self.layers = nn.ModuleList(
            Layer(sizes, bool(sparse), bool(moe)) for sparse, moe in zip(sizes.is_sparse, sizes.is_moe, strict=True)
        )
        self.final_norm = _zeros(sizes.hidden_size)
        self.head = _normal(sizes.vocab_size, sizes.hidden_size, std=0.002)
        self._tables: dict[tuple[int, int], Tensor] = {}

        if compiled:
            # One graph per length, kind of layer and support of the loss.
            torch._dynamo.config.recompile_limit = 64

        def maybe(function: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(function, dynamic=False) if compiled else function

        self._project, self._feed_dense, self._feed_moe = maybe(project), maybe(feed_dense), maybe(feed_moe)
        self._head_loss, self._index_loss = maybe(head_loss), maybe(index_loss)
        self._attend_sparse = SparseAttention(compiled)

    def decoder_layers(self) -> Iterator[Layer]:
        for layer in self.layers:
            assert isinstance(layer, Layer)
            yield layer

    def _cos_sin(self, batch: int, length: int, device: torch.device) -> Tensor:
        """float32 [batch * length, rotary_dim]."""
        if (batch, length) not in self._tables:
            table = rope_table(length, self.sizes.rotary_dim, self.sizes.rope_theta)
            self._tables[batch, length] = table.to(device).repeat(batch, 1)
        return self._tables[batch, length]

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
        weight: Tensor,
        *,
        plan: str,
        topk: int = 0,
        queries: Tensor | None = None,
        choose: Callable[[Tensor, Tensor, int], Chosen] = select,
    ) -> Pass:
        """One batch. tokens, targets: int64 [batch, length].  weight: float32 [batch, length], of each target.

        plan: a letter per layer: D attends to everything, F to the blocks that it selects, S to those of the nearest F
        above.  topk: blocks per query.  queries: int64 [batch, queries], whose block scores train the indexers.
        choose: of F layers, (index_q, index_k, topk) -> the blocks.
        """
        sizes, (batch, length) = self.sizes, tokens.shape
        cos_sin = self._cos_sin(batch, length, tokens.device)
        x = F.embedding(tokens.reshape(-1), self.embedding).to(self.dtype)
        act, eps = (sizes.swiglu_alpha, sizes.swiglu_limit), sizes.norm_eps
        loads, kl = [], torch.zeros((), device=x.device)
        done = Pass(kl, kl, kl, kl, x)
        chosen: Chosen | None = None
        index: tuple[Tensor, ...]
        for layer_id, (layer, role) in enumerate(zip(self.decoder_layers(), plan, strict=True)):
            weights = (layer.q, layer.k, layer.v, layer.q_norm, layer.k_norm)
            index = ()
            if layer.sparse:
                index = (layer.index_q, layer.index_k, layer.index_q_norm, layer.index_k_norm)
            heads = self._project(x, layer.input_norm, weights, index, cos_sin, eps)
            q, k, v = (part.view(batch, length, -1, part.shape[-1]).transpose(1, 2) for part in heads[:3])
            index_q, index_k = None, None
            if layer.sparse:
                index_q = heads[3].view(batch, length, -1, sizes.index_dim)
                index_k = heads[4].view(batch, length, sizes.index_dim)
            if role == "F":
                assert index_q is not None and index_k is not None
                chosen = choose(index_q, index_k, topk)
            if role == "D":
                attended = attend_dense(q, k, v)
            else:
                assert chosen is not None, f"{plan}: S needs an F above"
                attended = self._attend_sparse(q, k, v, chosen)
                done.chosen[layer_id] = chosen
            if queries is not None and index_q is not None and role != "S":
                blocks = chosen.blocks if role == "F" and chosen is not None else None
                layer_kl, *sample = self._index_loss(q, k, index_q, index_k, queries, blocks)
                kl = kl + layer_kl
                done.samples[layer_id], done.layer_kl[layer_id] = IndexSample(*sample), layer_kl.detach()
            attended = attended.transpose(1, 2).reshape(batch * length, -1)
            if layer.moe:
                x, load = self._feed_moe(
                    x,
                    attended,
                    layer.o,
                    layer.post_norm,
                    layer.router,
                    layer.bias,
                    (layer.w1, layer.w3, layer.w2),
                    act,
                    eps,
                    sizes.experts_per_token,
                    sizes.routed_scale,
                )
                loads.append(load)
            else:
                x = self._feed_dense(
                    x, attended, layer.o, layer.post_norm, (layer.gate, layer.up, layer.down), act, eps
                )
        done.kl, done.hidden = kl, x.view(batch, length, -1)
        done.loads = torch.stack(loads) if loads else x.new_zeros(0)
        done.loss, done.nats = self._loss(x, targets.reshape(-1), weight.view(-1))
        return done

    def _loss(self, x: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        loss, nats = torch.zeros((), device=x.device), []
        for start in range(0, len(x), _HEAD_CHUNK):
            rows = slice(start, start + _HEAD_CHUNK)
            part, part_nats = self._head_loss(
                x[rows], self.final_norm, self.head, targets[rows], weight[rows], self.sizes.norm_eps
            )
            loss = loss + part
            nats.append(part_nats)
        return loss, torch.cat(nats)

    @torch.no_grad()
    def predict(self, hidden: Tensor) -> Tensor:
        """The likeliest next tokens, int64 [rows]. hidden: [rows, hidden], before the final norm."""
        return self.logits(hidden).argmax(-1)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [rows, hidden], before the final norm -> [rows, vocab_size]."""
        return F.linear(rms_norm(hidden, self.final_norm, self.sizes.norm_eps), self.head.to(hidden.dtype))
