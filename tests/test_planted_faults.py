"""The checks are checked: rules and engine made wrong on purpose are refused, or shown up by the invariants."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import attention_nets  # noqa: F401  (these fill HARD_NETS)
import hard_nets  # noqa: F401
import layer_nets  # noqa: F401
import picture_nets  # noqa: F401
import secateur
from models import build as build_model
from models import images, random_scores, reference
from nets import IMAGE, TOKENS, Net, Run, conv, weights
from nets import build as build_net
from planted_faults import FAULTS, HARMLESS, Fault, blind, plant
from secateur import CutError, Plan, PlanError, TraceError
from secateur.graph.copies import output_tensors
from secateur.graph.rules import RULES

Tensor = torch.Tensor
OWN: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {}


def own(attributes: Callable[[], dict[str, Any]], *shapes: tuple[int, ...]) -> Callable[[Run], Run]:
    """Returns a decorator that makes of a function the forward of a net to plant faults in."""

    def add(run: Run) -> Run:
        OWN[run.__name__] = (lambda: Net(run, **attributes()), shapes or (TOKENS,))
        return run

    return add


def _linear(width: int, read: int | None = None, **others: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {
        "a": nn.Linear(6, width),
        "b": nn.Linear(read or width, 3),
        **{k: v() for k, v in others.items()},
    }


@own(lambda: {"a": conv(3, 8), "b": conv(3, 6), "c": conv(14, 3)}, IMAGE)
def concatenation(m: Net, x: Tensor) -> Tensor:
    return m.c(torch.cat([m.a(x), m.b(x)], 1)).mean((2, 3))


@own(_linear(9, c=lambda: nn.Linear(6, 9)))
def two_terms(m: Net, x: Tensor) -> Tensor:
    return m.b(m.a(x) + m.c(x))


@own(_linear(9, c=lambda: nn.Linear(9, 9)))
def residual(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y + m.c(F.relu(y)))


@own(_linear(12, 8))
def slices(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(F.relu(y)[..., :8] * y[..., 4:])


@own(_linear(12, 6, c=lambda: nn.Linear(6, 3)))
def every_other(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y[..., ::2]) - m.c(F.relu(y[..., ::2]))


@own(_linear(12))
def selection(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y * y[..., 3].unsqueeze(-1))


@own(_linear(12))
def taken_apart(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y * y.unbind(-1)[3][..., None])


@own(_linear(12, 6, c=lambda: nn.Linear(6, 3)))
def halves(m: Net, x: Tensor) -> Tensor:
    left, right = m.a(x).chunk(2, -1)
    return m.b(left) - m.c(right)


@own(_linear(12))
def mean_by_width(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y * (y.sum(-1, keepdim=True) / y.shape[-1]))


@own(_linear(12))
def flip_of_tokens(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y.flip(-1) + y)


@own(_linear(12))
def roll(m: Net, x: Tensor) -> Tensor:
    return m.b(m.a(x).roll(3, -1))


@own(_linear(8, 16))
def repeat_interleave(m: Net, x: Tensor) -> Tensor:
    return m.b(m.a(x).repeat_interleave(2, 2))


@own(_linear(8, 16))
def repeat(m: Net, x: Tensor) -> Tensor:
    return m.b(m.a(x).repeat(1, 1, 2))


@own(_linear(12))
def maximum(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y * y.argmax(-1, keepdim=True))


@own(_linear(12, s=lambda: weights(1)))
def expanded_to_a_constant(m: Net, x: Tensor) -> Tensor:
    return m.b(m.a(x) * m.s.expand(12))


@own(_linear(12, 16))
def padded(m: Net, x: Tensor) -> Tensor:
    return m.b(F.pad(m.a(x), (1, 3)))


@own(_linear(12))
def numbered(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y * torch.arange(y.shape[-1], device=x.device))


@own(_linear(12))
def of_zeros(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(torch.maximum(y, torch.zeros_like(y)))


@own(_linear(12))
def in_order(m: Net, x: Tensor) -> Tensor:
    return m.b(m.a(x).sort(-1).values)


@own(_linear(12, 3))
def windows_of_channels(m: Net, x: Tensor) -> Tensor:
    return m.b(F.relu(m.a(x)).unfold(-1, 4, 4).mean(-1))


@own(_linear(12, 3, index=lambda: nn.Buffer(torch.tensor([7, 2, 4]))))
def channels_by_a_table(m: Net, x: Tensor) -> Tensor:
    return m.b(m.a(x)[..., m.index])


@own(_linear(9, c=lambda: nn.Linear(6, 9), index=lambda: nn.Buffer(torch.tensor([1, 4]))))
def written_by_a_table(m: Net, x: Tensor) -> Tensor:
    y = F.relu(m.a(x))
    y[:, m.index] = m.c(x)[:, :2]
    return m.b(y)


@own(_linear(9, c=lambda: nn.Linear(6, 9), index=lambda: nn.Buffer(torch.tensor([1, 4, 0, 0, 2]))))
def added_by_a_table(m: Net, x: Tensor) -> Tensor:
    return m.b(F.relu(m.a(x)).index_add(1, m.index, m.c(x)))


@own(_linear(9, index=lambda: nn.Buffer(torch.tensor([1, 4, 0]))))
def gathered_tokens(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(y.gather(1, m.index[None, :, None].expand(x.shape[0], -1, y.shape[-1])))


@own(_linear(9, 3, index=lambda: nn.Buffer(torch.tensor([7, 4, 0]))))
def gathered_channels(m: Net, x: Tensor) -> Tensor:
    return m.b(m.a(x).gather(-1, m.index.expand(*x.shape[:2], -1)))


@own(
    lambda: {"a": conv(3, 8), "b": conv(8, 3), "boxes": nn.Buffer(torch.tensor([[0, 1, 1, 6, 6], [1, 0, 2, 5, 7.0]]))},
    IMAGE,
)
def regions(m: Net, x: Tensor) -> Tensor:
    return m.b(torchvision.ops.roi_align(m.a(x), m.boxes, 4))


@own(_linear(12, edges=lambda: nn.Buffer(torch.tensor([-1.0, 0.0, 1.0]))))
def numbers_of_bins(m: Net, x: Tensor) -> Tensor:
    return m.b(torch.bucketize(m.a(x), m.edges).to(m.b.weight.dtype))


@own(_linear(9))
def by_value(m: Net, x: Tensor) -> Tensor:
    y = F.relu(m.a(x)).flatten(0, 1)
    return m.b(y)[(y.sum(-1) > 1.5).nonzero()[:, 0]]


@own(_linear(9))
def by_remainder(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(F.relu(y) if y.shape[-1] % 5 else y)


@own(_linear(12))
def by_divisibility(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(F.relu(y) if y.shape[-1] % 4 == 0 else y)


@own(_linear(9, c=lambda: nn.Linear(9, 3), d=lambda: nn.Linear(6, 9)))
def stacked(m: Net, x: Tensor) -> Tensor:
    left, right = torch.stack([m.a(x), m.d(x)])
    return m.b(left) - m.c(F.relu(right))


@own(_linear(8))
def halves_with_a_gate_each(m: Net, x: Tensor) -> Tensor:
    y = torch.stack(m.a(x).chunk(2, -1), 2)
    return m.b((y * y.square().sum(-1, keepdim=True).sigmoid()).flatten(2))


def _attend(y: Tensor) -> Tensor:
    return (y @ y.mT * 0.4).softmax(-1) @ y


@own(lambda: {"qkv": nn.Linear(6, 48), "mix": nn.Linear(4, 4), "b": nn.Linear(16, 3), "heads": 4})
def heads_of_two_sorts(m: Net, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).view(*x.shape[:2], 3, m.heads, -1).permute(2, 0, 3, 1, 4)
    scores = m.mix((q @ k.mT * 0.4).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return m.b((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@own(lambda: {"a": nn.Linear(6, 16), "c": nn.Linear(6, 12), "b": nn.Linear(3, 3), "heads": 4})
def heads_that_meet(m: Net, x: Tensor) -> Tensor:
    left, right = (_attend(f(x).view(*x.shape[:2], m.heads, -1).transpose(1, 2)) for f in (m.a, m.c))
    return m.b((left[..., :, None] * right[..., None, :]).sum((1, 3)))


@own(lambda: {**{n: nn.Linear(6, 16) for n in "qkv"}, "b": nn.Linear(16, 3), "heads": 4, "head_dim": 4})
def temperature_by_a_reciprocal(m: Net, x: Tensor) -> Tensor:
    q, k, v = (f(x).view(*x.shape[:2], m.heads, m.head_dim).transpose(1, 2) for f in (m.q, m.k, m.v))
    scores = q @ k.mT * (1 / math.sqrt(m.head_dim))
    return m.b((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@own(lambda: {"a": nn.Linear(6, 16), "b": nn.Linear(16, 3), "heads": 4, "head_dim": 4})
def halves_of_heads(m: Net, x: Tensor) -> Tensor:
    y = m.a(x).view(*x.shape[:2], m.heads, m.head_dim).transpose(1, 2)
    half = m.head_dim // 2
    y = torch.cat([y[..., half:].tanh(), y[..., :half]], -1)
    return m.b(_attend(y).transpose(1, 2).flatten(2))


@own(lambda: {**{n: nn.Linear(6, 16) for n in "qkv"}, "b": nn.Linear(16, 3), "heads": 4})
def written_queries(m: Net, x: Tensor) -> Tensor:
    q = m.q(x)
    q[:, 0].add_(1.0)
    q, k, v = (y.view(*x.shape[:2], m.heads, -1).transpose(1, 2) for y in (q, m.k(x), m.v(x)))
    return m.b(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@own(lambda: {"a": nn.Linear(6, 16), "b": nn.Linear(8, 3)})
def half_of_a_width(m: Net, x: Tensor) -> Tensor:
    y = F.relu(m.a(x))
    return m.b(y[..., : y.shape[-1] // 2]) + y.sum(-1, keepdim=True)


@own(lambda: {"stem": nn.Linear(6, 16), "a": nn.Linear(16, 16), "b": nn.Linear(16, 3), "heads": 4})
def quotient_of_a_width(m: Net, x: Tensor) -> Tensor:
    x = F.relu(m.stem(x))
    n, t, c = x.shape
    return m.b(_attend(m.a(x).view(n, t, m.heads, c // m.heads).transpose(1, 2)).transpose(1, 2).flatten(2))


@own(lambda: {"a": nn.Linear(6, 16), "b": nn.Linear(16, 3), "c": nn.Linear(6, 12), "d": nn.Linear(12, 3), "heads": 4})
def heads_beside_parts(m: Net, x: Tensor) -> Tensor:
    y, parts = (f(x).view(*x.shape[:2], m.heads, -1) for f in (m.a, m.c))
    return m.b(_attend(y.transpose(1, 2)).transpose(1, 2).flatten(2)) + m.d(F.relu(parts).flatten(2))


@own(_linear(9, w=lambda: weights(9, 6)))
def turned_weight(m: Net, x: Tensor) -> Tensor:
    return m.b(F.relu(x @ m.w.t()))


@own(_linear(9))
def copied(m: Net, x: Tensor) -> Tensor:
    return m.b(F.relu(m.a(x).clone()))


@own(_linear(9))
def expanded(m: Net, x: Tensor) -> Tensor:
    y = F.relu(m.a(x)).mean(1, keepdim=True)
    return m.b(y.expand(-1, 5, -1))


@own(_linear(9, n=lambda: 9))
def above_zeros(m: Net, x: Tensor) -> Tensor:
    return m.b(torch.maximum(m.a(x), torch.zeros(m.n, dtype=x.dtype, device=x.device)))


@own(lambda: {"a": nn.Linear(6, 16), "b": nn.Linear(5, 3), "c": nn.Linear(11, 3), "n": 5, "both": 16})
def split_of_a_sum(m: Net, x: Tensor) -> Tensor:
    left, right = m.a(x).split([m.n, m.both - m.n], -1)
    return m.b(F.relu(left)) + m.c(F.relu(right))


@own(_linear(9, 18, n=lambda: 9))
def twice_a_width(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    return m.b(torch.cat([y, F.relu(y)], -1).view(*x.shape[:2], 2 * m.n))


MODELS = ("vit", "beit", "swin", "resnet18")


def build(subject: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Returns a net of this file, of the others, or a real model, with random values, and inputs for it."""
    if subject in MODELS:
        return build_model(subject), (images(),)
    if subject not in OWN:
        return build_net(subject)
    torch.manual_seed(0)
    make, shapes = OWN[subject]
    return make().double().eval(), tuple(torch.randn(s, dtype=torch.float64) for s in shapes)


def planned(subject: str, request: Mapping[str, Any], seed: int) -> Plan:
    """Returns what is asked to be removed of a net, by scores drawn at random."""
    network = secateur.trace(*build(subject))
    known = {name for g in network.groups for name in (g.kind, g.name)}
    options = {"ratio": 0.4, **request, "ratios": {k: v for k, v in request.get("ratios", {}).items() if k in known}}
    return secateur.allocate(network, random_scores(network, seed), **options)


def verdict(subject: str, request: Mapping[str, Any], seed: int) -> str:
    """Returns who noticed that something is wrong: "refused" for the library itself, an invariant, or "nobody"."""
    # built again for each use, not copied: torch cannot copy every module after it has run
    (pruned, inputs), (expected, _) = build(subject), build(subject)
    try:
        plan = planned(subject, request, seed)
        secateur.cut_(pruned, plan)
    except (CutError, PlanError, TraceError) as error:
        assert not isinstance(error.__cause__, SLIPS), "the fault is a slip that stops the trace"
        return "refused"
    with FlopCounterMode(display=False) as counter:
        try:
            found = _values(pruned(*inputs))
        except (RuntimeError, ValueError, IndexError):
            return "does not run"
    wanted = _values(reference(expected, {(c.tensor, c.dim): list(c.removed) for c in plan.cuts})(*inputs))
    if found.shape != wanted.shape or not (found - wanted).abs().max() < 1e-9 * wanted.abs().max():
        return "other output"
    cost = counter.get_total_flops() // 2, sum(p.numel() for p in pruned.parameters())
    return "nobody" if cost == (plan.macs * inputs[0].shape[0], plan.params) else "other cost"


SLIPS = (TypeError, AttributeError, NameError, KeyError)
"""What a fault must not raise: it would be found on the spot, not by a check."""


def _values(output: object) -> Tensor:
    return torch.cat([t.detach().flatten() for t in output_tensors(output)])


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_does_not_go_unnoticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FAULTS[name]
    used = plant(fault, monkeypatch)
    verdicts = {verdict(fault.subject, fault.request, seed) for seed in range(3)}
    assert used, "the network does not meet the fault"
    assert verdicts != {"nobody"}


def _state(subject: str) -> object:
    network = secateur.trace(*build(subject))
    return network.num_channels, network.frozen


@pytest.mark.parametrize("name", HARMLESS)
def test_a_harmless_fault_changes_the_analysis_and_no_output(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = HARMLESS[name]
    right = _state(fault.subject)
    plant(fault, monkeypatch)
    assert _state(fault.subject) != right
    assert {verdict(fault.subject, fault.request, seed) for seed in range(3)} == {"nobody"}


ALL = [*FAULTS.values(), *HARMLESS.values()]


@pytest.mark.parametrize("subject", sorted({f.subject for f in ALL}))
def test_without_a_fault_all_is_well(subject: str) -> None:
    for request in {str(f.request): f.request for f in ALL if f.subject == subject}.values():
        assert {verdict(subject, request, seed) for seed in range(3)} == {"nobody"}


def test_every_rule_has_a_fault() -> None:
    planted = {RULES[f.place] for f in ALL if f.place in RULES}
    assert {r.__name__ for r in RULES.values()} - {r.__name__ for r in planted} == set()


def test_a_size_that_is_no_multiple_any_more_is_refused_by_the_check_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verdict("by_divisibility", {}, 0) == "refused"
    plant(Fault("surgery.cutting:check", blind, "by_divisibility"), monkeypatch)
    assert verdict("by_divisibility", {}, 0) == "other output"
