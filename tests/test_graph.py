"""The label engine on small networks, one for each hard case."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import attention_nets  # noqa: F401  (these fill HARD_NETS)
import hard_nets  # noqa: F401
import layer_nets  # noqa: F401
import picture_nets  # noqa: F401
import secateur
import temperature_nets  # noqa: F401
from models import IMAGE, random_scores, reference
from models import build as build_model
from nets import HARD_NETS, NETS, build
from secateur.graph.copies import output_tensors

UNCOUNTED = ("spectral_norm",)
"""Nets with a matrix times a vector, which the counter has no formula for."""


def _values(output: object) -> torch.Tensor:
    return torch.cat([t.flatten() for t in output_tensors(output)])


def _macs(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> float:
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops() / 2 / inputs[0].shape[0]


def _plan(network: secateur.Network, seed: int) -> secateur.Plan:
    ratios = {"head_dims": 0.4} if any(g.kind == "head_dims" for g in network.groups) else None
    return secateur.allocate(network, random_scores(network, seed), ratio=0.4, ratios=ratios)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [*NETS, *HARD_NETS])
def test_cut_equals_absence(name: str, seed: int) -> None:
    model, inputs = build(name)
    plan = _plan(secateur.trace(model, inputs), seed)
    # built again, not copied: torch cannot copy every module after it has run
    pruned, expected = build(name)[0], build(name)[0]
    secateur.cut_(pruned, plan)
    reference(expected, {(c.tensor, c.dim): list(c.removed) for c in plan.cuts})
    with torch.no_grad():
        a, b = _values(pruned(*inputs)), _values(expected(*inputs))
    assert (a - b).abs().max() < 1e-9 * b.abs().max()
    assert sum(p.numel() for p in pruned.parameters()) == plan.params
    if name not in UNCOUNTED:
        assert (_macs(model, inputs), _macs(pruned, inputs)) == (plan.dense_macs, plan.macs)


@pytest.mark.parametrize("name", [*NETS, *HARD_NETS])
def test_cut_net_trains(name: str) -> None:
    model, inputs = build(name)
    secateur.cut_(model, _plan(secateur.trace(model, inputs), 0))
    _values(model.train()(*inputs)).sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads
    assert all(g.isfinite().all() for g in grads)


EXPECTED = {
    "mlp": {"a": 20},
    "gated_mlp": {"a": 10},  # both halves lose the same neuron
    "channel_shuffle": {"a": 6, "b": 10},
    "dense_concatenation": {"a": 8, "b": 6, "d": 5},
    "flattened_feature_map": {"a": 8},
    "grouped_conv": {"0": 4, "2": 18},
    "shared_module": {"a": 9},
    "tied_weights": {"a": 9},
    "pixel_shuffle": {"a": 4},
    "squeeze_excite": {"a": 8, "b": 4},
    "fixed_slices": {"a": 8},  # the first four keep their places
    "uneven_split": {},
    "flip": {},
    "written_in_place": {"a": 4},
    "unknown_operator": {},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_channels_found(name: str) -> None:
    model, inputs = build(name)
    assert {g.name: g.size for g in secateur.trace(model, inputs).groups} == EXPECTED[name]


@pytest.mark.parametrize("name", HARD_NETS)
def test_channels_found_in_hard_nets(name: str) -> None:
    model, inputs = build(name)
    found: Counter[str] = Counter()
    for group in secateur.trace(model, inputs).groups:
        found[group.name.partition("#")[0]] += group.size  # the pieces of a split layer count together
    assert found == HARD_NETS[name].groups


@pytest.mark.parametrize(
    ("name", "reason", "count"),
    [
        ("fixed_slices", "a fixed position along it is read", 4),
        ("uneven_split", "its size comes from a constant", 16),
        ("unknown_operator", "no rule for the operator aten.linalg_qr", 5),
        ("written_in_place", "written in place", 8),
    ],
)
def test_what_stays_is_named_with_its_reason_and_line(name: str, reason: str, count: int) -> None:
    model, inputs = build(name)
    frozen = [f for f in secateur.trace(model, inputs).frozen if (f.tensor, f.dim) == ("a.weight", 0)]
    assert len(frozen) == 1
    assert reason in frozen[0].reason
    assert "nets.py" in frozen[0].where
    assert frozen[0].count == count


def test_unknown_operator_is_listed() -> None:
    model, inputs = build("unknown_operator")
    assert [name for name, _ in secateur.trace(model, inputs).unknown_operators] == ["linalg_qr"]


def test_strict_refuses_an_operator_without_a_rule() -> None:
    model, inputs = build("unknown_operator")
    with pytest.raises(secateur.TraceError, match=r"no rule for aten.linalg_qr in .*nets.py"):
        secateur.trace(model, inputs, strict=True)


class _Auxiliary(torch.nn.Module):
    """A net with a head that runs in training mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.aux = (torch.nn.Linear(i, o) for i, o in ((4, 8), (8, 3), (8, 3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        y = self.a(x).relu()
        return (self.b(y), self.aux(y)) if self.training else self.b(y)


def test_heads_that_only_training_reaches_are_cut_along() -> None:
    model = _Auxiliary()
    network = secateur.trace(model, torch.empty(2, 4))
    assert network.macs == 4 * 8 + 8 * 3
    assert model.training
    secateur.cut_(model, secateur.allocate(network, random_scores(network)))
    assert model.aux.weight.shape == (3, 4)
    main, auxiliary = model(torch.randn(2, 4))
    (main.sum() + auxiliary.sum()).backward()


@pytest.mark.parametrize("name", ["vit", "beit", "hf_vit", "hf_beit", "deit_distilled"])
def test_transformers_fall_into_the_families_of_the_field(name: str) -> None:
    families = secateur.trace(build_model(name), torch.empty(IMAGE)).families
    shapes = {family: [g.channels.shape for g in groups] for family, groups in families.items()}
    mlp = 80 if name.startswith("hf") else 192
    assert shapes == {
        "embedding": [(1, 48)],
        "mlp": [(1, mlp)] * 2,
        "heads": [(1, 4)] * 2,
        "head_dims.qk": [(4, 12)] * 2,
        "head_dims.v": [(4, 12)] * 2,
    }


def test_swin_bias_tables_lose_the_column_of_a_head() -> None:
    network = secateur.trace(build_model("swin"), torch.empty(IMAGE))
    heads = network.select("layers.0.blocks.0.attn:heads")[0]
    table = network.axis("layers.0.blocks.0.attn.relative_position_bias_table", 1)
    assert table.channels.tolist() == heads.channels.ravel().tolist()


def test_patch_merging_repeats_each_channel_four_times() -> None:
    network = secateur.trace(build_model("swin"), torch.empty(IMAGE))
    merged = network.axis("layers.1.downsample.reduction.weight", 1).channels
    stream = network.axis("patch_embed.proj.weight", 0).channels
    assert merged.tolist() == stream.tolist() * 4


def test_attributes_that_decide_sizes_are_found() -> None:
    network = secateur.trace(build_model("vit"), torch.empty(IMAGE))
    found = {str(a) for a in network.attributes}
    assert {"blocks.0.attn.num_heads", "blocks.0.attn.head_dim", "blocks.0.attn.attn_dim"} <= found
    assert "norm.normalized_shape[0]" in found


@pytest.mark.parametrize("name", ["vit", "deit_distilled", "beit", "swin", "convnext", "resnet50"])
def test_a_new_classifier_can_be_put_on_after_a_cut(name: str) -> None:
    model = build_model(name)
    network = secateur.trace(model, torch.empty(IMAGE))
    secateur.cut_(model, secateur.allocate(network, random_scores(network)))
    model.reset_classifier(5)  # type: ignore[operator]
    with torch.no_grad():
        assert model.double()(torch.zeros(IMAGE, dtype=torch.float64)).shape == (1, 5)


def test_residual_branches_are_found() -> None:
    network = secateur.trace(build_model("vit"), torch.empty(IMAGE))
    assert [r.where for r in network.residuals] == ["blocks.0", "blocks.0", "blocks.1", "blocks.1"]
    assert "blocks.0.attn.qkv" in network.residuals[0].branch
    assert "blocks.0.mlp.fc2" in network.residuals[1].branch


def test_explain_says_what_goes_with_an_axis() -> None:
    network = secateur.trace(build_model("vit"), torch.empty(IMAGE))
    text = network.explain("blocks.1.attn.qkv.weight", 0)
    assert "144 indices, out" in text
    assert "blocks.1.attn:heads" in text
    assert "sets blocks.1.attn.head_dim" in text
    with pytest.raises(secateur.InputError, match=r"did you mean 'blocks.1.attn.qkv.weight'"):
        network.explain("blocks.1.attn.qkv.weigth", 0)
    with pytest.raises(secateur.InputError, match="no dimension 5"):
        network.explain("blocks.1.attn.qkv.weight", 5)


def test_inputs_may_be_a_tensor_a_tuple_or_a_dict() -> None:
    model = build_model("hf_vit")
    x = torch.empty(IMAGE)
    prints = {secateur.trace(model, inputs).macs for inputs in (x, (x,), {"pixel_values": x})}
    assert len(prints) == 1


def test_batch_size_does_not_change_macs_per_example() -> None:
    model = build_model("torchvision_vit")
    assert secateur.trace(model, torch.empty(4, *IMAGE[1:])).macs == secateur.trace(model, torch.empty(IMAGE)).macs


def test_analysis_needs_no_weights() -> None:
    import timm

    with torch.device("meta"):
        model = timm.create_model("vit_giant_patch14_224")
    network = secateur.trace(model, torch.empty(1, 3, 224, 224))
    assert network.params == sum(p.numel() for p in model.parameters()) > 1e9


def test_a_model_that_fails_says_so_with_its_own_error() -> None:
    with pytest.raises(
        secateur.TraceError, match=r"failed in 'patch_embed'.*\(1, 3, 32, 32\).*doesn't match"
    ) as caught:
        secateur.trace(build_model("vit"), torch.empty(1, 3, 32, 32))
    assert isinstance(caught.value.__cause__, AssertionError)


def test_a_failed_trace_leaves_no_trace() -> None:
    model, _ = build("mlp")
    hooks = [len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(secateur.TraceError):
        secateur.trace(model, torch.empty(2, 99))
    assert hooks == [len(m._forward_hooks) for m in model.modules()]
    assert torch.empty(2, 3).shape == (2, 3)
    secateur.trace(model, torch.empty(2, 6))


def test_a_rule_cannot_be_registered_twice() -> None:
    from secateur.graph.rules import rule

    with pytest.raises(ValueError, match="has a rule already"):
        rule("linear")(lambda call: None)  # type: ignore[arg-type,return-value]


def test_deep_chains_are_no_problem() -> None:
    model = torch.nn.Sequential(*(m for _ in range(500) for m in (torch.nn.Linear(4, 4), torch.nn.ReLU())))
    assert len(secateur.trace(model, torch.empty(1, 4)).groups) == 499


def test_torch_fast_path_runs_after_a_cut() -> None:
    model, inputs = build("torch_encoder")
    network = secateur.trace(model, inputs)
    secateur.cut_(model, secateur.allocate(network, random_scores(network)))
    with torch.no_grad():
        slow = model(*inputs)
        torch.backends.mha.set_fastpath_enabled(True)
        try:
            fast = model(*inputs)
        finally:
            torch.backends.mha.set_fastpath_enabled(False)
    assert torch.allclose(fast, slow, rtol=1e-9)
