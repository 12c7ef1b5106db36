"""What a cut must be, on every model: equal to absence, as predicted, sound, atomic, deterministic."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import secateur
from models import IMAGE, MODELS, WITH_HEADS, build, images, outputs, random_scores, reference

REQUESTS: dict[str, dict[str, Any]] = {
    "global": {"ratio": 0.5},
    "local": {"ratio": 0.4, "scope": "local"},
    "most": {"ratio": 0.95},
    "heads_and_dims": {"ratio": 0.3, "ratios": {"head_dims": 0.5}},
    "dims": {"ratio": 0.6, "ratios": {"heads": 0.0, "head_dims": 0.6}},
    "attention_alone": {"ratio": 0.0, "ratios": {"heads": 0.5, "head_dims": 0.4}},
    "even": {"ratio": 0.5, "round_to": 4},
}


def _cases() -> list[tuple[str, str]]:
    # a size tied to the embedding's cannot change alone, and models without heads have no heads to choose
    tied = ("beit", "beitv2", "torchvision_vit", "torchvision_swin")
    return [
        (model, request)
        for model in MODELS
        for request, values in REQUESTS.items()
        if ("ratios" not in values or model in WITH_HEADS) and not (model in tied and request == "attention_alone")
    ]


@pytest.mark.parametrize(("name", "request_name"), _cases())
def test_cut_equals_absence_and_costs_what_the_plan_says(name: str, request_name: str) -> None:
    model = build(name)
    network = secateur.trace(model, torch.empty(IMAGE))
    plan = secateur.allocate(network, random_scores(network, 3), **REQUESTS[request_name])
    assert plan.params < plan.dense_params
    x = images()
    pruned = secateur.cut(model, plan)
    removed = {(c.tensor, c.dim): list(c.removed) for c in plan.cuts}
    expected = outputs(reference(copy.deepcopy(model), removed), x)
    difference = (outputs(pruned, x) - expected).abs().max() / expected.abs().max()
    assert difference < 1e-9

    assert sum(p.numel() for p in pruned.parameters()) == plan.params
    assert sum(p.numel() for p in model.parameters()) == plan.dense_params
    assert _counted(pruned) == plan.macs
    assert _counted(model) == plan.dense_macs


def _counted(model: torch.nn.Module) -> int:
    counter = FlopCounterMode(display=False)
    fused = torch.backends.mha.get_fastpath_enabled()  # the counter has no formula for torch's fused encoder layer
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with counter:
            outputs(model, images(1))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", MODELS)
def test_pruned_model_trains(name: str) -> None:
    model = build(name).float()
    network = secateur.trace(model, torch.empty(IMAGE))
    secateur.cut_(model, secateur.allocate(network, random_scores(network), ratio=0.6))
    model.train()
    result = model(images().float())
    logits = [v for v in (result.values() if hasattr(result, "keys") else [result]) if isinstance(v, torch.Tensor)]
    sum(v.square().mean() for v in logits).backward()  # type: ignore[union-attr]
    touched = [p for p in model.parameters() if p.grad is not None]
    assert len(touched) > 0.8 * len(list(model.parameters()))
    assert all(p.grad is not None and p.grad.shape == p.shape and p.grad.isfinite().all() for p in touched)


def _state(model: torch.nn.Module) -> dict[str, Any]:
    return {
        "tensors": {k: v.clone() for k, v in model.state_dict().items()},
        "modes": [m.training for m in model.modules()],
        "attributes": [
            {k: (v, type(v)) for k, v in vars(m).items() if isinstance(v, (int, float, tuple))} for m in model.modules()
        ],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "grads": [p.requires_grad for p in model.parameters()],
    }


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    tensors = all(torch.equal(a["tensors"][k], b["tensors"][k]) for k in a["tensors"])
    return tensors and all(a[k] == b[k] for k in a if k != "tensors")


@pytest.mark.parametrize("name", ["vit", "hf_swin", "torchvision_vit", "resnet18"])
def test_trace_leaves_the_model_as_it_was(name: str) -> None:
    model = build(name).train()
    before, random = _state(model), torch.get_rng_state()
    secateur.trace(model, torch.empty(IMAGE))
    assert _same(before, _state(model))
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("name", ["vit", "hf_beit", "resnet18"])
def test_failed_cut_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    network = secateur.trace(model, torch.empty(IMAGE))
    plan = secateur.allocate(network, random_scores(network))
    before = _state(model)

    def refuse(*_: object) -> None:
        raise secateur.CutError("no")

    monkeypatch.setattr("secateur.surgery.cutting.check", refuse)
    with pytest.raises(secateur.CutError):
        secateur.cut_(model, plan)
    assert _same(before, _state(model))


def test_same_seed_gives_the_same_plan() -> None:
    plans = []
    for _ in range(2):
        network = secateur.trace(build("swin"), torch.empty(IMAGE))
        plans.append(secateur.allocate(network, random_scores(network)).to_json())
    assert plans[0] == plans[1]


def test_macs_of_vit_base_agree_with_a_count_by_hand() -> None:
    import timm

    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    network = secateur.trace(model, torch.empty(1, 3, 224, 224))
    tokens, width, hidden, heads, blocks = 197, 768, 3072, 12, 12
    block = tokens * width * (3 * width + width + 2 * hidden) + 2 * heads * tokens * tokens * width // heads
    expected = 196 * width * 3 * 16 * 16 + blocks * block + width * 1000
    assert network.macs == expected
    assert math.isclose(network.macs, 17.56e9, rel_tol=1e-3)
    assert network.params == 86_567_656
