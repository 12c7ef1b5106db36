"""The checks are checked: rules made subtly wrong on purpose are refused, or shown up by the oracle."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur
from models import build as build_model
from models import images, outputs, random_scores, reference
from nets import NETS, Net
from nets import build as build_net
from secateur import CutError, TraceError
from secateur.graph.labels import Labels, align_blocks, labels_of, regroup, tensors_in, varying
from secateur.graph.relations import Operand, Relations
from secateur.graph.rules import RULES, Call, Rule, elementwise

Result = Labels | tuple[Labels, ...]


class Altered:
    """The relations of a trace with some methods replaced: what a rule forgets to say, or says wrongly."""

    def __init__(self, relations: Any, **methods: Callable[..., Any]) -> None:
        self._relations, self._methods = relations, methods

    def __getattr__(self, name: str) -> Any:
        return self._methods[name] if name in self._methods else getattr(self._relations, name)


def says_nothing(*_: object, **__: object) -> None:
    """A relation that the rule forgot."""


def forgets(*methods: str) -> Callable[[Rule], Rule]:
    """Returns what makes a rule forget some of the relations that it should state."""
    return with_relations(**dict.fromkeys(methods, says_nothing))


def with_relations(**methods: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Returns what makes a rule state relations through `methods` instead."""

    def alter(right: Rule) -> Rule:
        def wrong(call: Call) -> Result:
            return right(dataclasses.replace(call, relations=Altered(call.relations, **methods)))  # type: ignore[arg-type]

        return wrong

    return alter


def unrelated(operands: list[Operand]) -> tuple[np.ndarray, ...]:
    """A join that relates nothing: of components along the same dimensions the first stands for all."""
    found: list[np.ndarray] = []
    for array in (a for o in operands for a in o.arrays if varying(a)):
        if not any(varying(array) & varying(other) for other in found):
            found.append(array)
    return tuple(found)


def instead(wrong: Rule) -> Callable[[Rule], Rule]:
    """Returns what puts another rule in place of the right one."""
    return lambda _: wrong


def after(change: Callable[[Call, Labels], Labels]) -> Callable[[Rule], Rule]:
    """Returns what makes a rule yield changed labels."""

    def alter(right: Rule) -> Rule:
        def wrong(call: Call) -> Result:
            result = right(call)
            return tuple(change(call, r) for r in result) if isinstance(result, tuple) else change(call, result)

        return wrong

    return alter


def reversed_operands(right: Rule) -> Rule:
    """A concatenation in the wrong order."""

    def wrong(call: Call) -> Result:
        return right(dataclasses.replace(call, arguments={**call.arguments, "tensors": call["tensors"][::-1]}))

    return wrong


def plain_view(call: Call) -> Labels:
    """A view that moves labels rightly and says nothing about fibres, order or sizes."""
    old, new = call.shape("self"), tuple(call.output.shape)
    return call.labels("self").map(lambda a: regroup(a, old, new, align_blocks(old, new)))


def as_it_was(call: Call) -> Labels:
    """A change of layout that leaves labels where they stood."""
    return call.labels("self").map(lambda a: a)


def first_operand_alone(call: Call) -> Labels:
    """An elementwise operation that does not tie its operands."""
    rank = call.output.ndim
    labelled = [t for t in tensors_in(call.arguments) if labels_of(t).arrays]
    labels = labels_of(labelled[0])
    return Labels(tuple(a.reshape((1,) * (rank - a.ndim) + a.shape) for a in labels.arrays))


def value_alone(call: Call) -> Labels:
    """An attention that takes its output for its values: queries and keys do not meet, and there are no heads."""
    return Labels(call.labels("value").arrays)


def shifted(call: Call, labels: Labels) -> Labels:
    """Labels one position further along the last dimension."""
    return labels.map(lambda a: np.roll(a, 1, -1))


def tiled(call: Call) -> Labels:
    """repeat_interleave taken for repeat."""
    axis, times = call["dim"], call["repeats"]
    return call.labels("self").map(lambda a: np.tile(a, [times if i == axis else 1 for i in range(a.ndim)]))


def interleaved(call: Call) -> Labels:
    """repeat taken for repeat_interleave."""
    times = list(call["repeats"])
    return call.labels("self").map(lambda a: np.repeat(a, times[-1], -1) if a.shape[-1] > 1 else a)


def constant(call: Call) -> Labels:
    """An operation after which nothing is known, though it passes channels on."""
    return Labels()


def _halves(m: Net, x: torch.Tensor) -> torch.Tensor:
    left, right = m.a(x).chunk(2, -1)
    return m.b(left) - m.c(right)


def _mean(x: torch.Tensor) -> torch.Tensor:
    return x * (x.sum(-1, keepdim=True) / x.shape[-1])


def _conv(i: int, o: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, 3, padding=1, **options)


def _own_net(make: Callable[[], nn.Module], *shapes: tuple[int, ...]) -> Callable[[], tuple[nn.Module, Any]]:
    def build() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        return make().double().eval(), tuple(torch.randn(s, dtype=torch.float64) for s in shapes)

    return build


TOKENS, PICTURE = (2, 5, 6), (2, 3, 8, 8)
SUBJECTS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    **{name: (lambda name=name: build_net(name)) for name in NETS},
    **{name: (lambda name=name: (build_model(name), (images(),))) for name in ("vit", "beit", "swin", "resnet18")},
    "concatenation": _own_net(
        lambda: Net(
            lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)).mean((2, 3)), a=_conv(3, 8), b=_conv(3, 6), c=_conv(14, 3)
        ),
        PICTURE,
    ),
    "sum": _own_net(
        lambda: Net(lambda m, x: m.c(m.a(x) + m.b(x)), a=nn.Linear(6, 9), b=nn.Linear(6, 9), c=nn.Linear(9, 3)), TOKENS
    ),
    "residual": _own_net(
        lambda: Net(
            lambda m, x: m.head(m.a(x) + m.b(F.relu(m.a(x)))),
            a=nn.Linear(6, 9),
            b=nn.Linear(9, 9),
            head=nn.Linear(9, 3),
        ),
        TOKENS,
    ),
    "slices": _own_net(
        lambda: Net(lambda m, x: m.b(F.relu(m.a(x))[..., :8] * m.a(x)[..., 4:]), a=nn.Linear(6, 12), b=nn.Linear(8, 3)),
        TOKENS,
    ),
    "selection": _own_net(
        lambda: Net(lambda m, x: m.b(m.a(x) * m.a(x)[..., 3].unsqueeze(-1)), a=nn.Linear(6, 12), b=nn.Linear(12, 3)),
        TOKENS,
    ),
    "halves": _own_net(lambda: Net(_halves, a=nn.Linear(6, 12), b=nn.Linear(6, 3), c=nn.Linear(6, 3)), TOKENS),
    "mean": _own_net(lambda: Net(lambda m, x: m.b(_mean(m.a(x))), a=nn.Linear(6, 12), b=nn.Linear(12, 3)), TOKENS),
    "depthwise": _own_net(
        lambda: nn.Sequential(_conv(3, 6), nn.ReLU(), _conv(6, 6, groups=6), nn.ReLU(), _conv(6, 3)), PICTURE
    ),
    "flip_of_tokens": _own_net(
        lambda: Net(lambda m, x: m.b(m.a(x).flip(-1) + m.a(x)), a=nn.Linear(6, 12), b=nn.Linear(12, 3)), TOKENS
    ),
    "roll": _own_net(lambda: Net(lambda m, x: m.b(m.a(x).roll(3, -1)), a=nn.Linear(6, 12), b=nn.Linear(12, 3)), TOKENS),
    "repeat_interleave": _own_net(
        lambda: Net(lambda m, x: m.b(m.a(x).repeat_interleave(2, 2)), a=nn.Linear(6, 8), b=nn.Linear(16, 3)), TOKENS
    ),
    "repeat": _own_net(
        lambda: Net(lambda m, x: m.b(m.a(x).repeat(1, 1, 2)), a=nn.Linear(6, 8), b=nn.Linear(16, 3)), TOKENS
    ),
    "maximum": _own_net(
        lambda: Net(lambda m, x: m.b(m.a(x) * m.a(x).argmax(-1, keepdim=True)), a=nn.Linear(6, 12), b=nn.Linear(12, 3)),
        TOKENS,
    ),
}


@dataclasses.dataclass(frozen=True)
class Fault:
    """A wrong rule for `operator`, the network that meets it, and what is asked to be removed there."""

    operator: str
    alter: Callable[[Rule], Rule]
    subject: str
    request: Mapping[str, Any] = dataclasses.field(default_factory=dict)


BOTH: dict[str, Any] = {"ratios": {"head_dims": 0.5}}
DIMS: dict[str, Any] = {"ratios": {"heads": 0.0, "head_dims": 0.5}}
FAULTS: dict[str, Fault] = {
    "cat in the wrong order": Fault("cat", reversed_operands, "concatenation"),
    "cat in the wrong order, of what was concatenated": Fault("cat", reversed_operands, "dense_concatenation"),
    "permute forgets to permute": Fault("permute", instead(as_it_was), "vit"),
    "view forgets sizes": Fault("view", with_relations(bind=lambda *_: True), "vit"),
    "view forgets the order of what it merges": Fault("view", instead(plain_view), "channel_shuffle"),
    "view shifts positions": Fault("view", after(shifted), "attention_power", BOTH),
    "linear does not tie its input": Fault("linear", with_relations(join=unrelated), "mlp"),
    "linear forgets its bias": Fault("linear", lambda right: lambda call: right(_without(call, "bias")), "mlp"),
    "add does not tie its operands": Fault("add", instead(first_operand_alone), "sum"),
    "residual add does not tie its operands": Fault("add", instead(first_operand_alone), "vit"),
    "mul does not tie its operands": Fault("mul", instead(first_operand_alone), "gated_mlp"),
    "relu shifts positions": Fault("relu", after(shifted), "residual"),
    "slice holds no positions": Fault("slice", forgets("freeze", "pin"), "slices"),
    "slice of a fixed part holds no positions": Fault("slice", forgets("freeze", "pin"), "fixed_slices"),
    "select holds no positions": Fault("select", forgets("freeze", "pin"), "selection"),
    "split holds no sizes": Fault("split_with_sizes", forgets("freeze", "pin"), "uneven_split"),
    "halves may differ": Fault("chunk", forgets("add_fibres", "freeze"), "halves"),
    "flip holds no positions": Fault("flip", forgets("freeze", "pin"), "flip_of_tokens"),
    "flip of feature maps holds no positions": Fault("flip", forgets("freeze", "pin"), "flip"),
    "roll holds no positions": Fault("roll", forgets("freeze", "pin"), "roll"),
    "repeat_interleave taken for repeat": Fault("repeat_interleave", instead(tiled), "repeat_interleave"),
    "repeat taken for repeat_interleave": Fault("repeat", instead(interleaved), "repeat"),
    "argmax holds no positions": Fault("argmax", forgets("freeze", "pin"), "maximum"),
    "attention ties nothing": Fault("scaled_dot_product_attention", instead(value_alone), "vit", BOTH),
    "attention ties nothing, with a bias per head": Fault("scaled_dot_product_attention", instead(value_alone), "beit"),
    "attention changes its temperature": Fault(
        "scaled_dot_product_attention",
        lambda right: lambda call: right(dataclasses.replace(call, arguments={**call.arguments, "scale": 1.0})),
        "vit",
        DIMS,
    ),
    "product does not tie what it contracts": Fault("matmul", with_relations(join=unrelated), "attention_power", BOTH),
    "softmax loses heads": Fault("softmax", instead(constant), "attention_power", BOTH),
    "layer norm forgets its scale": Fault("layer_norm", with_relations(join=unrelated), "vit"),
    "batch norm forgets its statistics": Fault("batch_norm", with_relations(join=unrelated), "resnet18"),
    "grouped convolution forgets its groups": Fault("conv2d", forgets("bundle", "add_fibres"), "grouped_conv"),
    "depthwise convolution does not tie its sides": Fault("conv2d", forgets("tie"), "depthwise"),
    "table shifts its columns": Fault("index", after(shifted), "swin"),
    "flattening shifts positions": Fault("flatten", after(shifted), "flattened_feature_map"),
    "pixel shuffle forgets what goes together": Fault("pixel_shuffle", forgets("bundle"), "pixel_shuffle"),
}


def _without(call: Call, argument: str) -> Call:
    return dataclasses.replace(call, arguments={**call.arguments, argument: None})


def difference(subject: str, request: Mapping[str, Any], seed: int) -> tuple[float, int]:
    """Returns by how much the cut network differs from the one without what was cut, and how many indices went.

    Raises what trace, allocate and cut raise.
    """
    model, inputs = SUBJECTS[subject]()
    network = secateur.trace(model, inputs)
    known = {g.kind for g in network.groups}
    ratios = {k: v for k, v in request.get("ratios", {}).items() if k in known}
    plan = secateur.allocate(network, random_scores(network, seed), ratio=0.4, ratios=ratios)
    pruned = secateur.cut(model, plan)
    removed = {(c.tensor, c.dim): list(c.removed) for c in plan.cuts}
    expected = outputs(reference(copy.deepcopy(model), removed), *inputs)
    with torch.no_grad():
        found = outputs(pruned, *inputs)
    if found.shape != expected.shape:
        return float("inf"), len(removed)
    return float((found - expected).abs().max() / expected.abs().max()), len(removed)


def verdict(fault: Fault, seed: int) -> str:
    """Returns who noticed: "refused" for the library itself, "oracle", or "nobody"."""
    try:
        wrong, _ = difference(fault.subject, fault.request, seed)
    except (CutError, TraceError):
        return "refused"
    return "oracle" if not wrong < 1e-9 else "nobody"


def plant(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Puts the wrong rule in; returns a list that grows with every call of it."""
    right = RULES.get(fault.operator, elementwise)
    used: list[str] = []
    wrong = fault.alter(right)

    def counted(call: Call) -> Result:
        used.append(call.name)
        return wrong(call)

    names = [n for n, r in RULES.items() if r is right] or [fault.operator]
    for name in names if fault.operator in RULES else [fault.operator]:
        monkeypatch.setitem(RULES, name, counted)
    return used


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_rule_does_not_go_unnoticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used = plant(FAULTS[name], monkeypatch)
    verdicts = [verdict(FAULTS[name], seed) for seed in range(3)]
    assert used, "the network does not meet the planted rule"
    assert set(verdicts) != {"nobody"}, verdicts


ENGINE: dict[str, tuple[str, Any, str, Mapping[str, Any]]] = {
    "ties are lost": ("tie", says_nothing, "gated_mlp", {}),
    "what goes together is lost": ("bundle", says_nothing, "pixel_shuffle", {}),
    "fibres may differ": ("add_fibres", says_nothing, "halves", {}),
    "attributes are not followed": ("bind", lambda *_: True, "attention_power", DIMS),
    "sizes that are computed with are forgotten": ("number", says_nothing, "mean", {}),
    "nothing is frozen": ("freeze", says_nothing, "roll", {}),
}


@pytest.mark.parametrize("name", ENGINE)
def test_a_wrong_engine_does_not_go_unnoticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, wrong, subject, request = ENGINE[name]
    monkeypatch.setattr(Relations, method, wrong)
    verdicts = [verdict(Fault("", instead(constant), subject, request), seed) for seed in range(3)]
    assert set(verdicts) != {"nobody"}, verdicts


def test_views_without_fibres_only_make_channels_coarser(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.empty(2, 5, 6)
    fine = secateur.trace(NETS["attention_power"][0](), inputs).num_channels
    plant(Fault("view", instead(plain_view), "attention_power"), monkeypatch)
    assert secateur.trace(NETS["attention_power"][0](), inputs).num_channels < fine
    assert difference("attention_power", BOTH, 0)[0] < 1e-9


SUBJECTS_USED = sorted({f.subject for f in FAULTS.values()} | {used for *_, used, _ in ENGINE.values()})


@pytest.mark.parametrize("subject", SUBJECTS_USED)
def test_the_right_rules_pass(subject: str) -> None:
    requests = [f.request for f in FAULTS.values() if f.subject == subject]
    requests += [request for *_, used, request in ENGINE.values() if used == subject]
    for request in {str(r): r for r in requests}.values():
        for seed in range(3):
            wrong, _ = difference(subject, request, seed)
            assert wrong < 1e-9
