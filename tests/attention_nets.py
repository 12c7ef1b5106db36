"""Networks with attention in every form in which people write it."""

from __future__ import annotations

import math

import einops
import torch
import torch.nn.functional as F
from einops.layers.torch import Rearrange, Reduce
from torch import nn
from torch.utils.checkpoint import checkpoint

from nets import TOKENS, Net, around, net, weights

Tensor = torch.Tensor
CONTEXT = (2, 7, 6)
STREAM = {"stem": 16}


def _attention(name: str, width: int, heads: int = 4) -> dict[str, int]:
    """Returns the groups of an attention: its heads, and its dimensions of queries with keys, and of values."""
    return {f"{name}:heads": heads, f"{name}:dims.qk": width, f"{name}:dims.v": width}


def _merge(heads: Tensor) -> Tensor:
    return heads.transpose(1, 2).flatten(2)


def _projections(heads: int = 4, **others: object) -> dict[str, object]:
    layers = {name: nn.Linear(6, 16) for name in ("q", "k", "v")}
    return {**layers, "out": nn.Linear(16, 3), "heads": heads, "head_dim": 16 // heads, **others}


def _split(m: Net, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, t, _ = x.shape
    q, k, v = (f(x).view(n, t, m.heads, m.head_dim).transpose(1, 2) for f in (m.q, m.k, m.v))
    return q, k, v


# torch's own attention and transformers

MHA = _attention("layer", 16)
NO_RESIDUAL = {**STREAM, **MHA, "layer.out_proj": 16}


@net((TOKENS,), lambda: around(nn.MultiheadAttention(16, 4, batch_first=True)), NO_RESIDUAL)
def mha_self(m: Net, x: Tensor) -> Tensor:
    x = m.stem(x)
    return m.head(m.layer(x, x, x, need_weights=False)[0])


@net((TOKENS,), lambda: around(nn.MultiheadAttention(16, 4, batch_first=True)), {**STREAM, **MHA})
def mha_self_with_weights(m: Net, x: Tensor) -> Tensor:
    x = m.stem(x)
    y, _ = m.layer(x, x, x)
    return m.head(F.relu(x + y))


@net((TOKENS,), lambda: around(nn.MultiheadAttention(16, 4)), NO_RESIDUAL)
def mha_sequence_first(m: Net, x: Tensor) -> Tensor:
    x = m.stem(x).transpose(0, 1)
    return m.head(m.layer(x, x, x, need_weights=False)[0]).transpose(0, 1)


@net(
    (TOKENS, CONTEXT),
    lambda: around(nn.MultiheadAttention(16, 4, batch_first=True), other=nn.Linear(6, 16)),
    NO_RESIDUAL,
)
def mha_cross(m: Net, x: Tensor, context: Tensor) -> Tensor:
    context = m.other(context)
    return m.head(m.layer(m.stem(x), context, context, need_weights=False)[0])


@net(
    (TOKENS, CONTEXT),
    lambda: around(nn.MultiheadAttention(16, 4, kdim=10, vdim=12), k=nn.Linear(6, 10), v=nn.Linear(6, 12)),
    {**NO_RESIDUAL, "k": 10, "v": 12},
)
def mha_cross_other_widths(m: Net, x: Tensor, context: Tensor) -> Tensor:
    x, context = m.stem(x).transpose(0, 1), context.transpose(0, 1)
    return m.head(m.layer(x, m.k(context), m.v(context))[0]).transpose(0, 1)


@net((TOKENS,), lambda: around(nn.MultiheadAttention(16, 4, batch_first=True, add_bias_kv=True)), NO_RESIDUAL)
def mha_bias_kv(m: Net, x: Tensor) -> Tensor:
    x = m.stem(x)
    return m.head(m.layer(x, x, x, need_weights=False)[0])


@net(
    (TOKENS,),
    lambda: around(nn.MultiheadAttention(16, 4, batch_first=True, add_zero_attn=True)),
    {"layer.out_proj": 16},
)
def mha_zero_attention(m: Net, x: Tensor) -> Tensor:
    x = m.stem(x)
    return m.head(m.layer(x, x, x)[0])


@net((TOKENS,), lambda: around(nn.MultiheadAttention(16, 4, batch_first=True)), NO_RESIDUAL)
def mha_causal_mask(m: Net, x: Tensor) -> Tensor:
    x = m.stem(x)
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype, device=x.device)
    return m.head(m.layer(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0])


@net(
    (TOKENS,),
    lambda: around(nn.MultiheadAttention(16, 4, batch_first=True), mask=torch.randn(8, 5, 5)),
    {"stem": 16, "layer": 32, "layer.out_proj": 16},  # the mask has a place for each head, so heads stay
)
def mha_mask_for_each_head(m: Net, x: Tensor) -> Tensor:
    x = m.stem(x)
    return m.head(m.layer(x, x, x, attn_mask=torch.zeros(8, 5, 5, dtype=x.dtype, device=x.device))[0])


@net(
    (TOKENS,),
    lambda: around(nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, norm_first=True)),
    {"stem": 16, "layer.linear1": 24, **_attention("layer.self_attn", 16)},
)
def encoder_layer_norm_first(m: Net, x: Tensor) -> Tensor:
    return m.head(m.layer(m.stem(x)))


@net(
    (TOKENS, CONTEXT),
    lambda: around(nn.TransformerDecoderLayer(16, 4, 24, batch_first=True), memory=nn.Linear(6, 16)),
    {
        "stem": 16,
        "layer.linear1": 24,
        **_attention("layer.self_attn", 16),
        **_attention("layer.multihead_attn", 16),
    },
)
def decoder_layer(m: Net, x: Tensor, context: Tensor) -> Tensor:
    return m.head(m.layer(m.stem(x), m.memory(context)))


@net(
    (TOKENS, CONTEXT),
    lambda: {"a": nn.Linear(6, 8), "t": nn.Transformer(8, 2, 1, 1, 12, batch_first=True), "head": nn.Linear(8, 3)},
    {
        "a": 8,
        **{f"t.{side}.layers.0.linear1": 12 for side in ("encoder", "decoder")},
        **_attention("t.encoder.layers.0.self_attn", 8, 2),
        **_attention("t.decoder.layers.0.self_attn", 8, 2),
        **_attention("t.decoder.layers.0.multihead_attn", 8, 2),
    },
)
def whole_transformer(m: Net, x: Tensor, y: Tensor) -> Tensor:
    mask = m.t.generate_square_subsequent_mask(y.shape[1], dtype=y.dtype, device=y.device)
    return m.head(m.t(m.a(x), m.a(y), tgt_mask=mask))


# attention by hand

HEADS = {"q:heads": 4, "q:dims.qk": 16, "v:dims.v": 16}


@net((TOKENS,), lambda: _projections(), {"q:heads": 4})
def rotary(m: Net, x: Tensor) -> Tensor:
    q, k, v = _split(m, x)
    half = m.head_dim // 2
    angles = torch.outer(torch.arange(x.shape[1]), 0.1 ** torch.arange(half)).repeat(1, 2).to(x)
    q, k = (y * angles.cos() + torch.cat([-y[..., half:], y[..., :half]], -1) * angles.sin() for y in (q, k))
    return m.out(_merge(F.scaled_dot_product_attention(q, k, v)))


@net((TOKENS,), lambda: _projections(), {"q:heads": 4})
def rotary_complex_pairs(m: Net, x: Tensor) -> Tensor:
    q, k, v = _split(m, x)
    angles = torch.outer(torch.arange(x.shape[1]), 0.1 ** torch.arange(m.head_dim // 2)).to(x)

    def rotate(y: Tensor) -> Tensor:
        even, odd = y[..., ::2], y[..., 1::2]
        turned = [even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()]
        return torch.stack(turned, -1).flatten(-2)

    return m.out(_merge(F.scaled_dot_product_attention(rotate(q), rotate(k), v)))


@net(
    (TOKENS,),
    lambda: {"up": nn.Linear(6, 10), "gate": nn.Linear(6, 10, bias=False), "down": nn.Linear(10, 3)},
    {"up": 10},
)
def swiglu(m: Net, x: Tensor) -> Tensor:
    return m.down(F.silu(m.gate(x)) * m.up(x))


@net((TOKENS,), lambda: {"both": nn.Linear(6, 20), "down": nn.Linear(10, 3)}, {"both": 10})
def glu(m: Net, x: Tensor) -> Tensor:
    return m.down(F.glu(m.both(x)))


@net(
    (TOKENS,),
    lambda: _projections(before=nn.Linear(4, 4), after=nn.Linear(4, 4)),
    {"q:heads": 4, "v:heads": 4, "before": 4, "q:dims.qk": 16, "v:dims.v": 16},
)
def talking_heads_twice(m: Net, x: Tensor) -> Tensor:
    q, k, v = _split(m, x)
    scores = m.before((q @ k.mT * 0.3).permute(0, 2, 3, 1)).softmax(-2)
    return m.out(_merge(m.after(scores).permute(0, 3, 1, 2) @ v))


def _grouped_queries() -> dict[str, object]:
    kv = {name: nn.Linear(6, 8) for name in ("k", "v")}
    return {"q": nn.Linear(6, 16), **kv, "out": nn.Linear(16, 3), "heads": 4, "kv_heads": 2, "head_dim": 4}


GROUPED = {"q:heads": 2, "q:dims.qk": 8, "v:dims.v": 8}


@net((TOKENS,), _grouped_queries, GROUPED)
def grouped_queries_repeated(m: Net, x: Tensor) -> Tensor:
    n, t, _ = x.shape
    q = m.q(x).view(n, t, m.heads, m.head_dim).transpose(1, 2)
    k, v = (f(x).view(n, t, m.kv_heads, m.head_dim).transpose(1, 2) for f in (m.k, m.v))
    k, v = (y.repeat_interleave(m.heads // m.kv_heads, 1) for y in (k, v))
    return m.out(_merge((q @ k.mT * 0.4).softmax(-1) @ v))


@net((TOKENS,), _grouped_queries, GROUPED)
def grouped_queries_expanded(m: Net, x: Tensor) -> Tensor:
    n, t, _ = x.shape
    q = m.q(x).view(n, t, m.heads, m.head_dim).transpose(1, 2)

    def repeated(y: Tensor) -> Tensor:
        y = y.view(n, t, m.kv_heads, m.head_dim).transpose(1, 2)[:, :, None]
        return y.expand(n, m.kv_heads, m.heads // m.kv_heads, t, m.head_dim).reshape(n, m.heads, t, m.head_dim)

    return m.out(_merge((q @ repeated(m.k(x)).mT * 0.4).softmax(-1) @ repeated(m.v(x))))


@net(
    (TOKENS,),
    lambda: _projections(k=nn.Linear(6, 4), v=nn.Linear(6, 4)),
    {"q:heads": 4, "q:dims.qk": 4, "v:dims.v": 4},
)
def multi_query(m: Net, x: Tensor) -> Tensor:
    n, t, _ = x.shape
    q = m.q(x).view(n, t, m.heads, m.head_dim).transpose(1, 2)
    scores = (q @ m.k(x)[:, None].mT * 0.4).softmax(-1)
    return m.out(_merge(scores @ m.v(x)[:, None]))


@net((TOKENS,), lambda: _projections(table=weights(9, 4)), HEADS)
def relative_position_bias(m: Net, x: Tensor) -> Tensor:
    q, k, v = _split(m, x)
    place = torch.arange(x.shape[1], device=x.device)
    bias = m.table[(place[:, None] - place[None] + x.shape[1] - 1).view(-1)].view(x.shape[1], x.shape[1], -1)
    return m.out(_merge(F.scaled_dot_product_attention(q, k, v, bias.permute(2, 0, 1)[None])))


@net((TOKENS,), lambda: _projections(table=nn.Embedding(9, 4)), HEADS)
def bias_from_an_embedding(m: Net, x: Tensor) -> Tensor:
    q, k, v = _split(m, x)
    place = torch.arange(x.shape[1], device=x.device)
    bias = m.table(place[:, None] - place[None] + x.shape[1] - 1).permute(2, 0, 1)
    return m.out(_merge((q @ k.mT * 0.3 + bias).softmax(-1) @ v))


@net((TOKENS,), lambda: _projections(slopes=nn.Buffer(torch.rand(4, 1, 1))), HEADS)
def linear_biases(m: Net, x: Tensor) -> Tensor:
    q, k, v = _split(m, x)
    place = torch.arange(x.shape[1], device=x.device)
    return m.out(_merge((q @ k.mT * 0.3 - m.slopes * (place[:, None] - place).abs()).softmax(-1) @ v))


@net(((2, 4, 4, 6),), lambda: _projections(), HEADS)
def shifted_windows(m: Net, x: Tensor) -> Tensor:
    n, h, w, c = x.shape
    x = x.roll((-1, -1), (1, 2)).view(n, h // 2, 2, w // 2, 2, c).transpose(2, 3).reshape(-1, 4, c)
    q, k, v = _split(m, x)
    y = m.out(_merge(F.scaled_dot_product_attention(q, k, v)))
    return y.view(n, h // 2, w // 2, 2, 2, -1).transpose(2, 3).reshape(n, h, w, -1).roll((1, 1), (1, 2))


class LayerScale(nn.Module):
    """Scales each channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Leaves a whole branch out, at random, while training."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.8).div_(0.8)


@net(
    (TOKENS,),
    lambda: around(nn.Sequential(nn.Linear(16, 9), nn.GELU(), nn.Linear(9, 16), LayerScale(16), DropPath())),
    {"stem": 16, "layer.0": 9},
)
def layer_scale_and_stochastic_depth(m: Net, x: Tensor) -> Tensor:
    x = m.stem(x)
    return m.head(x + m.layer(x))


@net((TOKENS,), lambda: around(nn.LayerNorm(16), cls=weights(1, 1, 16), position=weights(1, 6, 16)), STREAM)
def class_token(m: Net, x: Tensor) -> Tensor:
    x = torch.cat([m.cls.expand(x.shape[0], -1, -1), m.stem(x)], 1) + m.position
    return m.head(m.layer(F.gelu(x))[:, 0])


@net(
    (TOKENS,),
    lambda: around(nn.MultiheadAttention(16, 4, batch_first=True), queries=weights(3, 16)),
    {**STREAM, **MHA},
)
def learned_queries(m: Net, x: Tensor) -> Tensor:
    x = m.stem(x)
    queries = m.queries.unsqueeze(0).repeat(x.shape[0], 1, 1)
    return m.head(queries + m.layer(queries, x, x)[0])


@net(
    ((2, 3, 4, 4),),
    lambda: {
        "backbone": nn.Conv2d(3, 12, 3, padding=1),
        "project": nn.Conv2d(12, 16, 1),
        "queries": nn.Embedding(5, 16),
        "rows": weights(4, 8),
        "columns": weights(4, 8),
        "decoder": nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 24, batch_first=True), 2),
        "classes": nn.Linear(16, 3),
        "box": nn.Sequential(nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 4)),
    },
    {
        "project": 16,
        "backbone": 12,
        "box.0": 10,
        **{f"decoder.layers.{i}.linear1": 24 for i in range(2)},
        **_attention("decoder.layers.0.self_attn", 16),
        **_attention("decoder.layers.0.multihead_attn", 16),
        **_attention("decoder.layers.1.self_attn", 16),
        **_attention("decoder.layers.1.multihead_attn", 16),
    },
)
def detection_decoder(m: Net, x: Tensor) -> dict[str, Tensor]:
    y = m.project(F.relu(m.backbone(x)))
    n, _, h, w = y.shape
    places = torch.cat([m.columns[None, :w].repeat(h, 1, 1), m.rows[:h, None].repeat(1, w, 1)], -1)
    memory = y.flatten(2).transpose(1, 2) + places.flatten(0, 1)[None]
    found = m.decoder(m.queries.weight[None].expand(n, -1, -1), memory)
    return {"logits": m.classes(found), "boxes": m.box(found).sigmoid()}


@net((TOKENS,), lambda: _projections(scale=weights(4, 1, 1)), HEADS)
def cosine_attention(m: Net, x: Tensor) -> Tensor:
    q, k, v = _split(m, x)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * m.scale.clamp(max=4.0).exp()
    return m.out(_merge(scores.softmax(-1) @ v))


@net((TOKENS,), lambda: _projections(scale=weights(4, 1, 1)), {"q:heads": 4, "q:dims.v": 16, "k:dims.qk": 16})
def attention_across_channels(m: Net, x: Tensor) -> Tensor:
    q, k, v = (y.mT for y in _split(m, x))
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * m.scale
    return m.out(_merge((F.relu(scores) @ v).mT))


@net((TOKENS,), lambda: _projections(), HEADS)
def linear_attention(m: Net, x: Tensor) -> Tensor:
    q, k, v = _split(m, x)
    q, k = F.relu(q), F.relu(k)
    state = torch.einsum("bhtd,bhte->bhde", k, v)
    return m.out(_merge(torch.einsum("bhtd,bhde->bhte", q, state)))


class RMSNorm(nn.Module):
    """Root mean square normalisation, as in LLaMA."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    def without(self, removed: dict[tuple[str, int], list[int]]) -> None:
        """Makes the mean one over the survivors."""
        left = self.weight.numel() - len(removed.get(("weight", 0), []))
        self.forward = lambda x: self.weight * x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / left + 1e-6)


@net((TOKENS,), lambda: around(RMSNorm(16)), STREAM)
def rms_norm_by_hand(m: Net, x: Tensor) -> Tensor:
    return m.head(m.layer(m.stem(x)))


@net((TOKENS,), lambda: around(nn.RMSNorm(16)), STREAM)
def rms_norm(m: Net, x: Tensor) -> Tensor:
    return m.head(m.layer(m.stem(x)))


@net(
    (TOKENS,),
    lambda: {**_projections(), "q_norm": nn.LayerNorm(4), "k_norm": nn.LayerNorm(4)},
    {"q:heads": 4, "q:dims.qk": 4, "v:dims.v": 16},
)
def normalised_queries(m: Net, x: Tensor) -> Tensor:
    q, k, v = _split(m, x)
    return m.out(_merge(F.scaled_dot_product_attention(m.q_norm(q), m.k_norm(k), v)))


@net((TOKENS,), lambda: _projections(), {})
def constants_in_the_code(m: Net, x: Tensor) -> Tensor:
    n, t, _ = x.shape
    q, k, v = (f(x).view(n, t, 2, 8).transpose(1, 2) for f in (m.q, m.k, m.v))
    return m.out((F.scaled_dot_product_attention(q, k, v)).transpose(1, 2).reshape(n, t, 16))


@net((TOKENS,), lambda: _projections(memory=weights(2, 4, 3, 4)), {"q:heads": 4, "q:dims.v": 4})
def memory_tokens(m: Net, x: Tensor) -> Tensor:
    q, k, v = _split(m, x)
    more_k, more_v = (y.expand(x.shape[0], -1, -1, -1) for y in m.memory)
    return m.out(_merge(F.scaled_dot_product_attention(q, torch.cat([more_k, k], 2), torch.cat([more_v, v], 2))))


@net(
    (TOKENS,),
    lambda: {"qkv": nn.Linear(6, 48), "out": nn.Linear(16, 3), "heads": 4},
    _attention("qkv", 16),
)
def einops_attention(m: Net, x: Tensor) -> Tensor:
    q, k, v = einops.rearrange(m.qkv(x), "b n (three h d) -> three b h n d", three=3, h=m.heads)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
    return m.out(einops.rearrange(scores.softmax(-1) @ v, "b h n d -> b n (h d)"))


@net((TOKENS,), lambda: _projections(), {**HEADS})
def einops_attention_chunked(m: Net, x: Tensor) -> Tensor:
    q, k, v = (einops.rearrange(f(x), "b n (h d) -> b h n d", h=m.heads) for f in (m.q, m.k, m.v))
    y = F.scaled_dot_product_attention(q, k, v)
    return m.out(einops.rearrange(y, "b h n d -> b n (h d)"))


@net(
    ((2, 3, 8, 8),),
    lambda: {
        "patches": Rearrange("b c (h p) (w q) -> b (h w) (p q c)", p=4, q=4),
        "a": nn.Linear(48, 9),
        "token": weights(9),
        "pool": Reduce("b n c -> b c", "mean"),
        "b": nn.Linear(9, 3),
    },
    {"a": 9},
)
def einops_layers(m: Net, x: Tensor) -> Tensor:
    x = F.gelu(m.a(m.patches(x)))
    x = torch.cat([einops.repeat(m.token, "c -> b 1 c", b=x.shape[0]), x], 1)
    return m.b(m.pool(x) + einops.reduce(x, "b n c -> b c", "max"))


@net((TOKENS,), lambda: around(nn.Linear(16, 16), mask=None), STREAM)
def lazily_built_mask(m: Net, x: Tensor) -> Tensor:
    y = m.stem(x)
    if m.mask is None or m.mask.shape[-1] != x.shape[1]:
        m.mask = torch.full((x.shape[1], x.shape[1]), -math.inf, dtype=x.dtype, device=x.device).triu(1)
    return m.head((y @ m.layer(y).mT + m.mask).softmax(-1) @ y)


@net((TOKENS,), lambda: around(nn.Linear(16, 16), cache={}), {"stem": 16, "layer": 16})
def cached_positions(m: Net, x: Tensor) -> Tensor:
    y = m.stem(x)
    if x.shape[1] not in m.cache:
        m.cache[x.shape[1]] = torch.linspace(0, 1, x.shape[1], dtype=x.dtype, device=x.device)[:, None]
    return m.head(F.relu(m.layer(y + m.cache[x.shape[1]])))


@net((TOKENS,), lambda: around(nn.Linear(16, 16)), STREAM)
def where_masks(m: Net, x: Tensor) -> Tensor:
    y = m.stem(x)
    scores = (y @ m.layer(y).mT).masked_fill(torch.ones(5, 5, dtype=torch.bool, device=x.device).triu(1), -1e9)
    return m.head(torch.where(y > 0, scores.softmax(-1) @ y, 0.1 * y))


@net(
    (TOKENS,), lambda: around(nn.Sequential(nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 16))), {"stem": 16, "layer.0": 9}
)
def checkpointed(m: Net, x: Tensor) -> Tensor:
    x = m.stem(x)
    return m.head(x + checkpoint(m.layer, x, use_reentrant=False))


@net(
    (TOKENS,), lambda: around(nn.Sequential(nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 16))), {"stem": 16, "layer.0": 9}
)
def without_autocast(m: Net, x: Tensor) -> Tensor:
    x = m.stem(x)
    with torch.autocast(x.device.type, enabled=False):
        y = m.layer(x.to(m.head.weight.dtype))
    return m.head(x + y)
