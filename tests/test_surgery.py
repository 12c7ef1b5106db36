"""The cut: against smaller models built by hand, with optimizers, on copies, in half precision; and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from torch import nn

import secateur
from models import IMAGE, MODELS, build, images, outputs, random_scores
from secateur import CutError, Plan, PlanError, SecateurError

REQUESTS: dict[str, dict[str, Any]] = {
    "global": {"ratio": 0.5},
    "local": {"ratio": 0.5, "scope": "local"},
    "most": {"ratio": 0.9},
    "heads and dims": {"ratio": 0.4, "ratios": {"head_dims": 0.5}},
    "dims instead of heads": {"ratio": 0.3, "ratios": {"heads": 0.0, "head_dims": 0.6}},
    "mlp alone": {"ratio": 0.0, "ratios": {"mlp": 0.7}},
    "heads alone": {"ratio": 0.0, "ratios": {"heads": 0.5}},
    "embedding alone": {"ratio": 0.0, "ratios": {"embedding": 0.6}},
}


def plan_for(model: nn.Module, seed: int = 0, **request: Any) -> Plan:
    """Returns a plan made from random scores."""
    network = secateur.trace(model, torch.empty(IMAGE))
    return secateur.allocate(network, random_scores(network, seed), **request)


def survivors(plan: Plan, tensor: str, dim: int, size: int) -> list[int]:
    """Returns the indices that stay along one dimension."""
    gone = {i for c in plan.cuts if (c.tensor, c.dim) == (tensor, dim) for i in c.removed}
    return [i for i in range(size) if i not in gone]


def shrunk(plan: Plan, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor without what the plan removes from it."""
    for dim, size in enumerate(tensor.shape):
        tensor = tensor.index_select(dim, torch.tensor(survivors(plan, name, dim, size)))
    return tensor


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Returns everything about a model that a cut may change, to be compared with `unchanged`."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "tensors": {
            n: (id(t), t.detach().clone(), None if t.grad is None else t.grad.clone()) for n, t in tensors.items()
        },
        "attributes": [
            {k: v for k, v in vars(m).items() if isinstance(v, (int, float, tuple))} for m in model.modules()
        ],
    }


def unchanged(model: nn.Module, before: dict[str, Any]) -> bool:
    """True when nothing that `snapshot` saw is different."""
    now = snapshot(model)
    if now["attributes"] != before["attributes"] or now["tensors"].keys() != before["tensors"].keys():
        return False
    for name, (identity, values, grad) in before["tensors"].items():
        new_identity, new_values, new_grad = now["tensors"][name]
        same_grad = (grad is None) == (new_grad is None) and (grad is None or torch.equal(grad, new_grad))
        if identity != new_identity or not torch.equal(values, new_values) or not same_grad:
            return False
    return True


def vit_by_hand(name: str, model: nn.Module, plan: Plan) -> nn.Module:
    """Returns a smaller vision transformer put together from timm's parts and filled with the surviving weights.

    The whole model's embedding survivors are read off its position embedding, those of each block off its fc1 and qkv;
    everything else follows from how a vision transformer is wired.
    """
    width, size = 12, 48
    architecture = {"vit": "vit_tiny_patch16_224", "deit_distilled": "deit_tiny_distilled_patch16_224"}[name]
    stream = survivors(plan, "pos_embed", 2, size)
    small: Any = timm.create_model(
        architecture, img_size=64, num_classes=7, depth=2, embed_dim=len(stream), num_heads=1
    ).double()
    source = dict(model.named_parameters())

    def fill(tensor_name: str, *indices: list[int] | None) -> None:
        value = source[tensor_name].detach()
        for dim, index in enumerate(indices):
            value = value if index is None else value.index_select(dim, torch.tensor(index))
        with torch.no_grad():
            small.get_parameter(tensor_name).copy_(value)

    for number, block in enumerate(small.blocks):
        at = f"blocks.{number}"
        rows = survivors(plan, f"{at}.attn.qkv.weight", 0, 3 * size)
        places = [(row // size, row % size // width, row % width) for row in rows]  # query, key or value; head; dim
        kept_heads = sorted({head for _, head, _ in places})
        dims = {key: [d for part, head, d in places if (part, head) == key] for key in {p[:2] for p in places}}
        (kept_width,) = {len(d) for d in dims.values()}
        assert all(dims[0, head] == dims[1, head] for head in kept_heads)  # queries and keys lose the same ones
        block.attn = Attention(len(stream), len(kept_heads), attn_head_dim=kept_width, qkv_bias=True).double()
        block.attn.fused_attn, block.attn.scale = False, width**-0.5  # the temperature that the model was trained with
        hidden = survivors(plan, f"{at}.mlp.fc1.weight", 0, 4 * size)
        block.mlp = Mlp(len(stream), len(hidden)).double()
        columns = [head * width + d for part, head, d in places if part == 2]
        fill(f"{at}.attn.qkv.weight", rows, stream)
        fill(f"{at}.attn.qkv.bias", rows)
        fill(f"{at}.attn.proj.weight", stream, columns)
        fill(f"{at}.attn.proj.bias", stream)
        fill(f"{at}.mlp.fc1.weight", hidden, stream)
        fill(f"{at}.mlp.fc1.bias", hidden)
        fill(f"{at}.mlp.fc2.weight", stream, hidden)
        fill(f"{at}.mlp.fc2.bias", stream)
        for norm in ("norm1", "norm2"):
            fill(f"{at}.{norm}.weight", stream)
            fill(f"{at}.{norm}.bias", stream)
    for token in ("cls_token", "pos_embed", "dist_token") if name == "deit_distilled" else ("cls_token", "pos_embed"):
        fill(token, None, None, stream)
    for head in ("head", "head_dist") if name == "deit_distilled" else ("head",):
        fill(f"{head}.weight", None, stream)
        fill(f"{head}.bias")
    for vector in ("patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"):
        fill(vector, stream)
    return small.eval()


@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize("name", ["vit", "deit_distilled"])
def test_cut_equals_a_smaller_model_built_by_hand(name: str, request_name: str) -> None:
    model = build(name)
    for seed in range(2):
        plan = plan_for(model, seed, **REQUESTS[request_name])
        by_hand = vit_by_hand(name, model, plan)
        pruned = secateur.cut(model, plan)
        expected = outputs(by_hand, images())
        assert (outputs(pruned, images()) - expected).abs().max() < 1e-9 * expected.abs().max()
        assert sum(p.numel() for p in by_hand.parameters()) == plan.params < plan.dense_params


_SMALL = {"num_labels": 7, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
_SMALL |= {"image_size": 64}
_BEIT = {"use_relative_position_bias": True, "use_absolute_position_embeddings": True}
HALVED: dict[str, Callable[[], nn.Module]] = {
    "beit": lambda: timm.create_model(
        "beit_base_patch16_224", img_size=64, num_classes=7, depth=2, embed_dim=24, num_heads=2
    ),
    "hf_vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**_SMALL)),
    "hf_beit": lambda: transformers.BeitForImageClassification(transformers.BeitConfig(**_SMALL, **_BEIT)),
    "hf_deit_teacher": lambda: transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**_SMALL)),
    "torchvision_vit": lambda: torchvision.models.VisionTransformer(64, 16, 2, 2, 24, 40, num_classes=7),
    "swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=64,
        window_size=4,
        num_classes=7,
        embed_dim=12,
        depths=(2, 2),
        num_heads=(1, 3),
        head_dim=8,
    ),
    "convnext": lambda: timm.create_model("convnext_atto", num_classes=7, depths=(1, 1, 2, 1), dims=(8, 12, 16, 20)),
}


@pytest.mark.parametrize("name", HALVED)
def test_halved_model_is_the_published_architecture_at_half_the_size(name: str) -> None:
    model = build(name)
    plan = plan_for(model, ratio=0.5, scope="local")
    pruned = secateur.cut(model, plan)
    small = HALVED[name]().double().eval()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    mine = {**dict(small.named_parameters()), **dict(small.named_buffers())}
    assert mine.keys() == tensors.keys()
    with torch.no_grad():
        for tensor_name, tensor in mine.items():
            tensor.copy_(shrunk(plan, tensor_name, tensors[tensor_name]))
    expected = outputs(small, images())
    assert (outputs(pruned, images()) - expected).abs().max() < 1e-9 * expected.abs().max()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "plain": lambda p: torch.optim.SGD(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """Takes one step on a fixed batch and returns the loss, with the graph that it came from."""
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(images()), torch.tensor([2, 5]))
    loss.backward()
    optimizer.step()
    return loss


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", ["vit", "resnet18"])
def test_optimizer_goes_on_as_if_the_model_had_always_been_small(name: str, kind: str) -> None:
    model = build(name)
    optimizer = OPTIMIZERS[kind](model.parameters())
    for _ in range(2):
        loss = step(model, optimizer)  # stays alive, as in a training loop, with all that autograd keeps for it
    plan = plan_for(model, ratio=0.5)
    identities = [id(p) for p in model.parameters()]
    wide = {n: copy.deepcopy(optimizer.state[p]) for n, p in model.named_parameters()}
    dense = {n: p.detach().clone() for n, p in model.named_parameters()}
    apart = secateur.cut(model, plan)
    twin = OPTIMIZERS[kind](apart.parameters())

    secateur.cut_(model, plan, optimizer)
    assert loss.grad_fn is not None
    assert [id(p) for p in model.parameters()] == identities
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == identities
    for tensor_name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            before = wide[tensor_name][key]
            if isinstance(value, torch.Tensor) and before.shape == dense[tensor_name].shape:
                assert torch.equal(value, shrunk(plan, tensor_name, before))
                assert value.shape == parameter.shape
        twin.state[apart.get_parameter(tensor_name)] = copy.deepcopy(optimizer.state[parameter])
    for _ in range(2):
        assert torch.equal(step(model, optimizer), step(apart, twin))
    assert all(torch.equal(p, apart.get_parameter(n)) for n, p in model.named_parameters())
    assert all(not torch.equal(p, shrunk(plan, n, dense[n])) for n, p in model.named_parameters())


def test_optimizer_whose_state_has_another_layout_is_refused_and_nothing_changes() -> None:
    model = build("vit")
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(images()).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    plan, before = plan_for(model, ratios={"head_dims": 0.5}), snapshot(model)
    assert plan.rescales
    with pytest.raises(PlanError, match="LBFGS keeps for it"):
        secateur.cut_(model, plan, optimizer)
    assert unchanged(model, before)


def test_gradients_are_cut_along() -> None:
    model = build("vit")
    model(images()).square().mean().backward()
    model.get_parameter("pos_embed").grad = None
    model.get_parameter("norm.weight").requires_grad_(False)
    plan = plan_for(model, ratio=0.5)
    wide = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    secateur.cut_(model, plan)
    for name, parameter in model.named_parameters():
        expected = wide[name]
        if expected is None:
            assert parameter.grad is None
        else:
            assert parameter.grad is not None and torch.equal(parameter.grad, shrunk(plan, name, expected))
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["norm.weight"]


@pytest.mark.parametrize("name", ["vit", "hf_beit", "torchvision_swin", "mobilenetv2"])
def test_cut_leaves_the_original_alone(name: str) -> None:
    model = build(name).train()
    plan, before = plan_for(model), snapshot(model)
    pruned = secateur.cut(model, plan)
    assert unchanged(model, before)
    assert pruned.training and not {id(p) for p in model.parameters()} & {id(p) for p in pruned.parameters()}
    in_place = copy.deepcopy(model)
    secateur.cut_(in_place, plan)
    assert in_place.training
    assert all(torch.equal(p, in_place.get_parameter(n)) for n, p in pruned.named_parameters())


@pytest.mark.parametrize("name", MODELS)
def test_torch_modules_report_the_sizes_that_they_have(name: str) -> None:
    model = build(name)
    secateur.cut_(model, plan_for(model, ratio=0.5))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == tuple(module.weight.shape)
        elif isinstance(module, nn.Conv2d):
            assert (module.out_channels, module.in_channels // module.groups) == tuple(module.weight.shape[:2])
            assert module.in_channels % module.groups == 0 == module.out_channels % module.groups
        elif isinstance(module, nn.BatchNorm2d):
            assert {module.num_features} == {len(t) for t in (module.weight, module.running_mean, module.running_var)}
        elif isinstance(module, nn.LayerNorm):
            assert tuple(module.normalized_shape) == tuple(module.weight.shape)


def test_sizes_kept_in_attributes_follow() -> None:
    model: Any = build("vit")
    secateur.cut_(model, plan_for(model, ratio=0.5, scope="local", ratios={"head_dims": 0.25}))
    for block in model.blocks:
        assert (block.attn.num_heads, block.attn.head_dim, block.attn.attn_dim) == (2, 9, 18)
        assert (block.attn.qkv.in_features, block.attn.qkv.out_features) == (24, 54)
        assert (block.attn.proj.in_features, block.mlp.fc1.out_features) == (18, 96)
        assert block.norm1.normalized_shape == (24,) and type(block.attn.num_heads) is int
    assert model.patch_embed.proj.out_channels == 24 and model.head.in_features == 24


def test_depthwise_convolutions_keep_one_group_per_channel() -> None:
    model = build("mobilenetv2")
    dense = {n: m.groups for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1}
    secateur.cut_(model, plan_for(model, ratio=0.5, scope="local"))
    for name, groups in dense.items():
        layer = model.get_submodule(name)
        assert layer.groups == layer.in_channels == layer.out_channels == layer.weight.shape[0] == groups // 2


class Shared(nn.Module):
    """Two layers that share one weight, each with a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.head = (
            nn.Linear(6, 20),
            nn.Linear(20, 20),
            nn.Linear(20, 20),
            nn.Linear(20, 3),
        )
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.two(self.one(self.stem(x)).relu()).relu())


def test_shared_parameters_stay_shared() -> None:
    model = Shared().double()
    network = secateur.trace(model, torch.empty(1, 6))
    pruned: Any = secateur.cut(model, secateur.allocate(network, random_scores(network), ratio=0.5))
    assert pruned.one.weight is pruned.two.weight
    assert pruned.one.weight.shape == (10, 10)
    assert [pruned.two.in_features, pruned.two.out_features] == [10, 10]
    assert len(list(pruned.parameters())) == len(list(model.parameters()))
    assert pruned(torch.randn(2, 6, dtype=torch.float64)).shape == (2, 3)
    assert model.one.weight is model.two.weight and model.one.weight.shape == (20, 20)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["vit", "beit", "hf_swin", "resnet18"])
def test_half_precision_stays_half_precision_and_values_are_picked_exactly(name: str, dtype: torch.dtype) -> None:
    model = build(name).to(dtype)
    plan = plan_for(model, ratio=0.5)
    assert not plan.rescales
    pruned = secateur.cut(model, plan)
    assert {p.dtype for p in pruned.parameters()} == {dtype}
    assert all(torch.equal(p, shrunk(plan, n, model.get_parameter(n))) for n, p in pruned.named_parameters())
    assert outputs(pruned, images().to(dtype)).isfinite().all()


def test_integer_buffers_stay_as_they_are() -> None:
    model = build("resnet18").train()
    model(images())
    model.eval()
    pruned = secateur.cut(model, plan_for(model))
    assert pruned.get_buffer("bn1.num_batches_tracked").item() == 1
    assert pruned.get_buffer("bn1.num_batches_tracked").dtype == torch.int64


@pytest.mark.parametrize(("planned", "given"), [("vit", "hf_vit"), ("vit", "beit"), ("resnet18", "resnet50")])
def test_plan_for_another_architecture_is_refused_by_the_name_of_a_tensor(planned: str, given: str) -> None:
    plan, model = plan_for(build(planned)), build(given)
    before = snapshot(model)
    with pytest.raises(PlanError, match="another architecture") as caught:
        secateur.cut_(model, plan)
    assert any(repr(c.tensor) in str(caught.value) for c in plan.cuts)
    assert unchanged(model, before)


def test_plan_is_refused_although_all_that_it_cuts_is_there() -> None:
    plan, model = plan_for(build("vit")), build("deit_distilled")
    before = snapshot(model)
    with pytest.raises(PlanError, match="another architecture"):
        secateur.cut_(model, plan)
    assert unchanged(model, before)


@pytest.mark.parametrize("name", ["vit", "swin", "resnet18"])
def test_plan_applied_twice_is_refused(name: str) -> None:
    model = build(name)
    plan = plan_for(model)
    secateur.cut_(model, plan)
    before = snapshot(model)
    with pytest.raises(PlanError, match="was the model cut already") as caught:
        secateur.cut_(model, plan)
    assert any(repr(c.tensor) in str(caught.value) for c in plan.cuts)
    assert unchanged(model, before)


def test_a_cut_model_can_be_traced_and_cut_again() -> None:
    model = build("vit")
    first = plan_for(model, ratio=0.3)
    secateur.cut_(model, first)
    second = plan_for(model, seed=1, ratio=0.5)
    assert (second.dense_params, second.dense_macs) == (first.params, first.macs)
    secateur.cut_(model, second)
    assert sum(p.numel() for p in model.parameters()) == second.params
    assert outputs(model, images()).isfinite().all()


def test_plan_from_json_cuts_like_the_plan_itself() -> None:
    model = build("vit")
    plan = plan_for(model, ratio=0.6, ratios={"head_dims": 0.5})
    assert plan.rescales
    a, b = secateur.cut(model, plan), secateur.cut(model, Plan.from_json(plan.to_json()))
    assert torch.equal(outputs(a, images()), outputs(b, images()))


def _other_index(plan: Plan, tensor: str, dim: int) -> Plan:
    """Returns a plan that removes, from one tensor alone, another index than the others lose."""
    cuts = list(plan.cuts)
    at = next(i for i, c in enumerate(cuts) if (c.tensor, c.dim) == (tensor, dim))
    gone = set(cuts[at].removed)
    stays = next(i for i in range(cuts[at].size) if i not in gone)
    removed = tuple(sorted((gone - {min(gone)}) | {stays}))
    cuts[at] = dataclasses.replace(cuts[at], removed=removed)
    return dataclasses.replace(plan, cuts=tuple(cuts))


def _first_cut(plan: Plan, **changes: Any) -> Plan:
    return dataclasses.replace(plan, cuts=(dataclasses.replace(plan.cuts[0], **changes), *plan.cuts[1:]))


TAMPERED: dict[str, Callable[[Plan], Plan]] = {
    "another column of fc2": lambda p: _other_index(p, "blocks.0.mlp.fc2.weight", 1),
    "another bias of fc1": lambda p: _other_index(p, "blocks.1.mlp.fc1.bias", 0),
    "another row of qkv": lambda p: _other_index(p, "blocks.0.attn.qkv.weight", 0),
    "another scale of a norm": lambda p: _other_index(p, "blocks.1.norm2.weight", 0),
    "another channel of the positions": lambda p: _other_index(p, "pos_embed", 2),
    "a cut less": lambda p: dataclasses.replace(p, cuts=p.cuts[1:]),
    "no attributes": lambda p: dataclasses.replace(p, attributes=()),
    "other MACs": lambda p: dataclasses.replace(p, macs=p.macs + 1),
    "an index too far": lambda p: _first_cut(p, removed=(*p.cuts[0].removed[:-1], p.cuts[0].size)),
    "a negative index": lambda p: _first_cut(p, removed=(-1, *p.cuts[0].removed[1:])),
    "an index twice": lambda p: _first_cut(p, removed=(p.cuts[0].removed[0], *p.cuts[0].removed[:-1])),
    "a dimension too far": lambda p: _first_cut(p, dim=9),
    "an unknown tensor": lambda p: _first_cut(p, tensor="blocks.7.attn.qkv.weight"),
    "an unknown module": lambda p: dataclasses.replace(
        p, attributes=(dataclasses.replace(p.attributes[0], module="blocks.7"), *p.attributes[1:])
    ),
    "a path through nothing": lambda p: dataclasses.replace(
        p, attributes=(dataclasses.replace(p.attributes[0], path=("nothing", "here")), *p.attributes[1:])
    ),
}


@pytest.mark.parametrize("through_json", [False, True])
@pytest.mark.parametrize("case", TAMPERED)
def test_a_plan_that_is_not_consistent_is_refused_and_changes_nothing(case: str, through_json: bool) -> None:
    model = build("vit")
    plan = TAMPERED[case](plan_for(model, ratio=0.5))
    before = snapshot(model)
    with pytest.raises((PlanError, CutError)) as caught:
        secateur.cut_(model, Plan.from_json(plan.to_json()) if through_json else plan)
    assert isinstance(caught.value, SecateurError) and len(str(caught.value)) < 500
    assert unchanged(model, before)


def test_prune_does_it_all_in_one_call() -> None:
    model = build("vit")
    network = secateur.trace(model, torch.empty(IMAGE))
    expected = secateur.allocate(network, secateur.score(network, model, "l2"), ratio=0.5, scope="local")
    by_steps = secateur.cut(model, expected)
    plan = secateur.prune_(model, torch.empty(IMAGE), criterion="l2", ratio=0.5, scope="local")
    assert (plan.cuts, plan.request, plan.macs) == (expected.cuts, expected.request, expected.macs)
    assert torch.equal(outputs(model, images()), outputs(by_steps, images()))
    before = snapshot(model)
    for bad in ({"ratio": 1.0}, {"criterion": "l3"}, {"scope": "world"}):
        with pytest.raises(secateur.InputError):
            secateur.prune_(model, torch.empty(IMAGE), **bad)  # type: ignore[arg-type]
    with pytest.raises(secateur.TraceError, match="failed"):
        secateur.prune_(model, torch.empty(1, 3, 65, 65))
    assert unchanged(model, before)


class _Caching(nn.Module):
    """A module that keeps a table between runs in eval mode, as timm's LeViT does, and drops it in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)
        self.shift = nn.Parameter(torch.randn(8))
        self.kept: dict[str, torch.Tensor] = {}

    def train(self, mode: bool = True) -> _Caching:
        self.kept = {} if mode else self.kept
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return self.b(self.a(x) + self.shift)
        table = self.kept.setdefault(str(x.device), self.shift.tanh())
        return self.b(self.a(x) + table)


def test_what_a_model_kept_of_an_earlier_run_is_dropped() -> None:
    model = _Caching().eval()
    x = torch.randn(2, 4)
    with torch.no_grad():
        model(x)
    secateur.prune_(model, x, ratio=0.5)
    assert not model.training
    with torch.no_grad():
        assert model(x).shape == (2, 3)


def test_cuts_large_tensors_exactly() -> None:
    """Large tensors are cut a few rows at a time; the plan and plain selection say what must be left."""
    model = nn.Sequential(
        nn.Conv2d(3, 400, 3),
        nn.ReLU(),
        nn.Conv2d(400, 500, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(500, 4),
    )
    network = secateur.trace(model, torch.empty(1, 3, 8, 8))
    plan = secateur.allocate(network, random_scores(network, 5), ratio=0.4)
    expected = {name: shrunk(plan, name, tensor.detach()) for name, tensor in model.named_parameters()}
    secateur.cut_(model, plan)
    assert model[2].weight.shape[:2] != (500, 400)
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, expected[name]), name
