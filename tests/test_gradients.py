"""Gradients: exact per-sample squares on a zoo, any way to batch, nothing of the model disturbed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur.criteria.gradients as gradients_module
from criteria_models import (
    CRITERION_NAMES,
    NEEDS_BATCHES,
    attention,
    attention_batches,
    attention_network,
    axis,
    naive_scores,
    network,
    sample_gradients,
)
from secateur.criteria import (
    Calibration,
    cross_entropy,
    gradient_sum,
    logits_of,
    mean_squared_gradient,
    score,
)
from secateur.errors import InputError

# ---- gradients -------------------------------------------------------------------------------------------------------


def test_hessian_does_not_depend_on_how_samples_are_batched() -> None:
    model, net = attention().double(), attention_network()
    splits = [(7,), (4, 3), (1,) * 7, (2, 1, 4)]
    found = [score(net, model, "hessian", attention_batches(s, torch.float64)).values for s in splits]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-9)


def test_hessian_does_not_depend_on_the_memory_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    model, net = attention().double(), attention_network()
    found = []
    for budget, most in ((2**30, 16), (2**30, 2), (1, 16)):
        monkeypatch.setattr(gradients_module, "MEMORY_BUDGET", budget)
        monkeypatch.setattr(gradients_module, "MAX_SAMPLES_ON_CPU", most)
        found.append(score(net, model, "hessian", attention_batches(dtype=torch.float64)).values)
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-9)


def test_hessian_takes_one_forward_for_many_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    forwards = []
    model = attention()
    model.proj.register_forward_hook(lambda *_: forwards.append(1))
    score(attention_network(), model, "hessian", attention_batches((12,)))
    assert len(forwards) == 3  # the number of classes, the memory that a sample takes, and all twelve together


def test_hessian_is_a_mean_over_samples_not_the_last_one_nor_a_batch_square() -> None:
    model, net, batches = attention(), attention_network(), attention_batches()
    full = score(net, model, "hessian", batches).values
    last = score(net, model, "hessian", [(batches[-1][0][-1:], batches[-1][1][-1:])]).values
    assert not np.allclose(full, last, rtol=0.05)
    names = ["proj.weight"]
    whole = gradient_sum(Calibration(model, dict(model.named_parameters()), batches)).values["proj.weight"].square()
    exact = sample_gradients(model, names, batches)["proj.weight"].square().mean(0)
    assert not torch.allclose(whole, exact, rtol=0.05)


def test_taylor_depends_only_on_the_accumulated_gradient() -> None:
    model, net = attention().double(), attention_network()
    first, second = attention_batches(dtype=torch.float64)
    there = score(net, model, "taylor", [first, second]).values
    np.testing.assert_allclose(score(net, model, "taylor", [second, first]).values, there, rtol=1e-9)
    twice = score(net, model, "taylor", [first, second, first, second]).values
    np.testing.assert_allclose(twice, 2 * there, rtol=1e-9)


def test_taylor_gradients_that_cancel_between_batches_do_not_count() -> None:
    model = nn.Linear(2, 1, bias=False)
    net = network(2, [axis("weight", 1, "in", [0, 1])])
    batches = [(torch.tensor([[1.0, 1.0]]), torch.zeros(1)), (torch.tensor([[-1.0, 1.0]]), torch.zeros(1))]
    values = score(net, model, "taylor", batches, loss=lambda output, _: output.sum()).values
    np.testing.assert_allclose(values, [0.0, 2 * abs(model.weight[0, 1].item())], rtol=1e-6)


def test_loss_gets_the_models_own_output() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 3, bias=False), nn.Linear(2, 3, bias=False)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    model, net = TwoHeads(), network(2, [axis("a.weight", 1, "in", [0, 1]), axis("b.weight", 1, "in", [0, 1])])
    batches = [(torch.randn(4, 2), torch.tensor([0, 1, 2, 0]))]
    averaged = score(net, model, "taylor", batches).values
    explicit = score(net, model, "taylor", batches, loss=lambda out, y: F.cross_entropy((out[0] + out[1]) / 2, y))
    np.testing.assert_allclose(averaged, explicit.values, rtol=1e-6)
    only_first = score(net, model, "hessian", batches, loss=lambda out, y: F.cross_entropy(out[0], y)).values
    assert not np.allclose(only_first, score(net, model, "hessian", batches).values)


@pytest.mark.parametrize("name", NEEDS_BATCHES)
def test_labels_may_be_probabilities_and_any_integers(name: str) -> None:
    model, net, batches = attention().double(), attention_network(), attention_batches(dtype=torch.float64)
    expected = score(net, model, name, batches).values
    soft = [(x, F.one_hot(y, 5).double()) for x, y in batches]
    short = [(x, y.to(torch.int32)) for x, y in batches]
    np.testing.assert_allclose(score(net, model, name, soft).values, expected, rtol=1e-9)
    np.testing.assert_allclose(score(net, model, name, short).values, expected, rtol=1e-9)


@pytest.mark.parametrize("name", NEEDS_BATCHES)
def test_inputs_may_be_a_tensor_a_tuple_or_a_dict(name: str) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(3, 5, bias=False)

        def forward(self, x: Tensor, shift: Tensor, scale: Tensor, flip: bool = False) -> Tensor:
            return self.body(-x if flip else x) * scale + shift[:, None]

    model = Scaled().double()
    net = network(3, [axis("body.weight", 1, "in", [0, 1, 2])])
    x, shift, scale = torch.randn(4, 3).double(), torch.randn(4).double(), torch.tensor(2.0).double()
    y = torch.tensor([0, 4, 2, 2])
    by_place = score(net, model, name, [((x, shift, scale, True), y)]).values
    by_name = score(net, model, name, [({"scale": scale, "flip": True, "x": x, "shift": shift}, y)]).values
    by_list = score(net, model, name, [[[-x, shift, scale], y]]).values
    np.testing.assert_allclose(by_name, by_place, rtol=1e-9)
    np.testing.assert_allclose(by_list, by_place, rtol=1e-9)


def test_gradients_are_taken_under_no_grad_too() -> None:
    model, net, batches = attention(), attention_network(), attention_batches()
    expected = score(net, model, "taylor", batches).values
    with torch.no_grad():
        np.testing.assert_array_equal(score(net, model, "taylor", batches).values, expected)


def test_frozen_parameters_are_scored_too() -> None:
    model, net, batches = attention(), attention_network(), attention_batches()
    expected = score(net, model, "hessian", batches).values
    model.requires_grad_(False)
    np.testing.assert_array_equal(score(net, model, "hessian", batches).values, expected)


# ---- per-sample gradients on real architectures ----------------------------------------------------------------------


def timm_model(name: str, **kwargs: Any) -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model(name, num_classes=5, **kwargs)


def hugging_face(kind: str, **kwargs: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    sizes = {} if kind == "Swin" else {**sizes, "image_size": 16, "patch_size": 8}
    config = getattr(transformers, f"{kind}Config")(num_labels=5, **sizes, **kwargs)
    return getattr(transformers, f"{kind}ForImageClassification")(config)


def torchvision_vit() -> nn.Module:
    models = pytest.importorskip("torchvision.models.vision_transformer")
    return models.VisionTransformer(16, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=5)


VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 16, "patch_size": 8}
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2)}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
HF_SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}
ZOO: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "timm vit": (lambda: timm_model("vit_tiny_patch16_224", **VIT), 16),
    "timm beit": (lambda: timm_model("beit_base_patch16_224", **VIT, init_values=0.5), 16),
    "timm deit distilled": (lambda: timm_model("deit_tiny_distilled_patch16_224", **VIT), 16),
    "timm swin": (lambda: timm_model("swin_tiny_patch4_window7_224", **SWIN), 32),
    "timm resnet18": (lambda: timm_model("resnet18"), 32),
    "timm mobilenetv2": (lambda: timm_model("mobilenetv2_050"), 32),
    "timm convnext": (lambda: timm_model("convnext_atto", **CONVNEXT), 32),
    "hf vit": (lambda: hugging_face("ViT"), 16),
    "hf beit": (lambda: hugging_face("Beit", use_relative_position_bias=True), 16),
    "hf deit": (lambda: hugging_face("DeiT"), 16),
    "hf swin": (lambda: hugging_face("Swin", **HF_SWIN), 32),
    "hf dinov2": (lambda: hugging_face("Dinov2"), 16),
    "torchvision vit": (torchvision_vit, 16),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ZOO)
def test_squared_gradients_equal_a_loop_over_samples(name: str, dtype: torch.dtype) -> None:
    make, size = ZOO[name]
    model = make().to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 1 or not parameter.any():  # fresh norms, biases and some heads are constant
            nn.init.normal_(parameter, 1.0, 0.1)
    tensors = {key: p for key, p in model.named_parameters() if p.dim() > 1 or "norm" in key or "bn" in key}
    x, y = torch.randn(4, 3, size, size, dtype=dtype), torch.tensor([0, 4, 2, 2])
    inputs = {"pixel_values": x} if name.startswith("hf") else x
    found = mean_squared_gradient(Calibration(model, tensors, [(inputs, y)]))
    expected = sample_gradients(model, list(tensors), [(inputs, y)])
    tolerance = 1e-9 if dtype is torch.float64 else 1e-4
    for key, samples in expected.items():
        exact = samples.square().mean(0)
        # The smallest of a tensor's squared gradients are sums of rounding errors, hence the absolute part.
        torch.testing.assert_close(
            found.values[key], exact, rtol=tolerance, atol=tolerance * float(exact.max()) + 1e-30
        )
        assert key.endswith("mask_token") or not torch.allclose(exact, samples[-1].square(), rtol=0.05, atol=0.0)


def test_heads_of_a_traced_vit_hold_what_their_dimensions_hold() -> None:
    trace = pytest.importorskip("secateur.graph").trace
    model = timm_model("vit_tiny_patch16_224", **VIT).double()
    net = trace(model, torch.zeros(1, 3, 16, 16, dtype=torch.float64))
    values = score(net, model, "l2").values
    weights = {name: (p.double() ** 2).detach().numpy() for name, p in model.named_parameters()}
    np.testing.assert_allclose(values, naive_scores(net, weights), rtol=1e-9)
    heads = [group for group in net.groups if group.kind == "heads"]
    assert [group.size for group in heads] == [2, 2]


# ---- nothing disturbed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CRITERION_NAMES)
@pytest.mark.parametrize("sizes", [(4, 3), (1, 1, 1, 1)])
def test_scoring_leaves_the_model_as_it_was(name: str, sizes: Sequence[int]) -> None:
    model, net = attention(), attention_network()
    model.train()
    model.proj.eval()
    model.head.weight.requires_grad_(False)
    model.qkv.weight.grad = torch.full_like(model.qkv.weight, 3.0)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    identities = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    fast = torch.backends.mha.get_fastpath_enabled()

    score(net, model, name, attention_batches(sizes))

    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in state.items())
    assert [id(tensor) for tensor in (*model.parameters(), *model.buffers())] == identities
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes
    assert [key for key, p in model.named_parameters() if p.grad is not None] == ["qkv.weight"]
    assert torch.equal(model.qkv.weight.grad, torch.full_like(model.qkv.weight, 3.0))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_model_is_as_it_was_after_an_error() -> None:
    model, net = attention(), attention_network()
    model.train()
    random_state = torch.get_rng_state()
    with pytest.raises(InputError, match="batch 2: the model or the loss failed"):
        score(net, model, "hessian", [*attention_batches(), (torch.ones(2, 4, 9), torch.tensor([0, 1]))])
    assert model.training and model.drop.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


# ---- logits ----------------------------------------------------------------------------------------------------------


def test_logits_are_found_in_tensors_outputs_and_tuples() -> None:
    logits = torch.tensor([[1.0, 3.0]])
    assert logits_of(logits) is logits
    assert logits_of({"logits": logits, "other": 1}) is logits
    assert torch.equal(logits_of((logits, 3 * logits)), 2 * logits)
    assert torch.equal(logits_of([logits]), logits)
    assert cross_entropy((logits, logits), torch.tensor([1])) == F.cross_entropy(logits, torch.tensor([1]))


@pytest.mark.parametrize("output", [None, {}, (), {"features": torch.zeros(1)}, (torch.zeros(1, 2), torch.zeros(3))])
def test_output_without_logits_is_an_error(output: Any) -> None:
    with pytest.raises(InputError, match="no logits in the model's output"):
        logits_of(output)
