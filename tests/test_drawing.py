"""Drawings and explanations show all of a network, truly, legibly, and each thing once."""

from __future__ import annotations

import io
import re
import struct
import xml.etree.ElementTree as ElementTree
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import timm
import torch
from rich.console import Console
from torch import nn

import attention_nets  # noqa: F401  (these fill HARD_NETS)
import hard_nets  # noqa: F401
import layer_nets  # noqa: F401
import picture_nets  # noqa: F401
import secateur
from models import IMAGE, MODELS
from models import build as build_model
from nets import HARD_NETS, NETS
from nets import build as build_net
from secateur.graph.network import STAYS, merged
from secateur.report import drawing, explain, save_drawing
from secateur.report.layers import Layout, groups_of, lay_out
from secateur.report.tracks import find_tracks, place_lines, stop_of

ROOT = Path(__file__).resolve().parent.parent


@cache
def traced(name: str) -> secateur.Network:
    if name in MODELS:
        return secateur.trace(build_model(name), torch.empty(IMAGE))
    model, inputs = build_net(name)
    return secateur.trace(model, inputs)


@cache
def timm_network(name: str, **options: Any) -> secateur.Network:
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    return secateur.trace(model, torch.empty(1, 3, 224, 224))


def chain(depth: int, width: int = 6) -> secateur.Network:
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return secateur.trace(
        nn.Sequential(nn.Linear(3, width), nn.ReLU(), *layers, nn.Linear(width, 2)), torch.empty(1, 3)
    )


def titles(layout: Layout) -> list[tuple[str, int]]:
    return [(s.title or s.layers[0].name, s.times) for s in layout.sections]


def texts(network: secateur.Network, title: str = "") -> tuple[Any, list[Any]]:
    """Returns a drawing as a figure, and its pieces of text."""
    with matplotlib.rc_context(drawing._SETTINGS):
        figure = drawing._Sheet(network, lay_out(network), title).draw()
        figure.draw_without_rendering()
    return figure, [t for t in figure.axes[0].texts if t.get_text()]


@pytest.mark.parametrize("name", [*MODELS, *NETS, *HARD_NETS])
def test_every_axis_is_in_one_line_and_every_index_in_one_part(name: str) -> None:
    network = traced(name)
    layout = lay_out(network)
    lines = [(section.times, layer) for section in layout.sections for layer in section.layers]
    assert sum(times * len(layer.axes) for times, layer in lines) == len(network.axes)
    assert max(Counter(axis for _, layer in lines for axis in layer.axes).values(), default=1) == 1
    group_of = groups_of(network)
    for _, layer in lines:
        for side in (*layer.takes, *layer.makes, *layer.holds):
            axis = network.axes[side.axis]
            parts = Counter[int]()
            for part in side.parts:
                parts[part.group] += part.count
                assert (part.group == STAYS) == (part.note > 0)
            assert parts == Counter(group_of[axis.channels].tolist())
            assert set(side.heads) == {int(g) for g in group_of[axis.owners] if g != STAYS}


@pytest.mark.parametrize("name", [*MODELS, *NETS, *HARD_NETS])
def test_tracks_stop_where_their_group_lies_and_never_cover_each_other(name: str) -> None:
    network = traced(name)
    layout = lay_out(network)
    lines, _ = place_lines(layout.sections, 0.0)
    tracks = find_tracks(network, layout, lines)
    assert {track.group for track in tracks} == set(layout.stands_for)
    group_of = groups_of(network)
    expected: dict[int, dict[int, set[str]]] = {}
    for n, line in enumerate(lines):
        for axis in (network.axes[i] for i in (line.layer.axes if line.layer else ())):
            for group in {int(g) for g in group_of[np.concatenate([axis.channels, axis.owners])] if g != STAYS}:
                expected.setdefault(layout.stands_for[group], {}).setdefault(n, set()).add(axis.role)
    assert {track.group: track.stops for track in tracks} == expected
    columns: dict[int, list[tuple[int, int]]] = {}
    for track in tracks:
        columns.setdefault(track.column, []).append(track.span)
    for spans in columns.values():
        spans.sort()
        assert all(a[1] < b[0] for a, b in pairwise(spans))


def test_alike_blocks_are_folded_and_others_are_not() -> None:
    assert titles(lay_out(timm_network("vit_tiny_patch16_224"))) == [
        ("cls_token · pos_embed · patch_embed.proj", 1),
        ("blocks.0-11", 12),
        ("norm · head", 1),
    ]
    # Every second block of a Swin has a mask: they alternate.
    folded = titles(lay_out(timm_network("swin_tiny_patch4_window7_224")))
    assert ("layers.2.blocks.0,2,4", 3) in folded
    assert ("layers.2.blocks.1,3,5", 3) in folded
    assert ("layers.0.blocks.0", 1) in folded
    assert [t for t in titles(lay_out(timm_network("resnet50"))) if t[1] > 1] == [
        ("layer1.1,2", 2),
        ("layer2.1-3", 3),
        ("layer3.1-5", 5),
        ("layer4.1,2", 2),
    ]
    narrower: Any = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=5)
    narrower.blocks[2].mlp.fc1 = nn.Linear(192, 100)
    narrower.blocks[2].mlp.fc2 = nn.Linear(100, 192)
    layout = lay_out(secateur.trace(narrower, torch.empty(IMAGE)))
    assert [t for t in titles(layout) if t[0].startswith("blocks")] == [
        ("blocks.0,1", 2),
        ("blocks.2", 1),
        ("blocks.3,4", 2),
    ]


def test_layers_in_a_chain_hand_groups_on_and_are_not_told_as_one_group() -> None:
    network = chain(20)
    layout = lay_out(network)
    assert titles(layout) == [("0", 1), ("2", 1), ("4,6,..,38", 18), ("40", 1), ("42", 1)]
    lines, _ = place_lines(layout.sections, 0.0)
    stops = [stop_of(roles) for track in find_tracks(network, layout, lines) for roles in track.stops.values()]
    assert "both" not in stops
    assert {"out", "in"} == set(stops)


def test_a_norm_stands_with_the_weight_of_its_block_that_it_shares_channels_with() -> None:
    names = {layer.name for section in lay_out(timm_network("resnet50")).sections for layer in section.layers}
    assert {"conv1 · bn1", "conv2 · bn2", "conv3 · bn3", "downsample.{0 · 1}", "fc"} == names
    names = {layer.name for section in lay_out(traced("beit")).sections for layer in section.layers}
    assert "gamma_1 · gamma_2 · norm1 · attn.qkv" in names
    assert "attn.{q_bias · v_bias · relative_position_bias_table · k_bias}" in names


@pytest.mark.parametrize(
    "name", ["vit", "beit", "swin", "hf_swin", "resnet50", "mobilenetv2", "channel_shuffle", "gated_mlp"]
)
def test_no_text_lies_on_another_or_outside(name: str) -> None:
    figure, pieces = texts(traced(name), "a title")
    renderer = figure.canvas.get_renderer()
    boxes = [(t.get_window_extent(renderer), t.get_text()) for t in pieces]
    width, height = figure.bbox.size
    for i, (box, text) in enumerate(boxes):
        assert 0 <= box.x0 < box.x1 <= width, text
        assert 0 <= box.y0 < box.y1 <= height, text
        for other, words in boxes[i + 1 :]:
            beside = min(box.x1, other.x1) - max(box.x0, other.x0) < 1
            assert beside or min(box.y1, other.y1) - max(box.y0, other.y0) < 2, (text, words)


def test_an_svg_is_text_that_names_widths_families_ties_reasons_and_lines_of_code(tmp_path: Path) -> None:
    path = tmp_path / "beit.svg"
    save_drawing(timm_network("beit_base_patch16_224"), path, "BEiT <base>")
    root = ElementTree.parse(path).getroot()
    words = [e.text or "" for e in root.iter("{http://www.w3.org/2000/svg}text")]
    told = " ".join(words)
    assert root.tag.endswith("svg")
    assert {"BEiT <base>", "2304", "norm2 · mlp.fc1", "mlp 3072"} <= set(words)
    assert any(w.startswith("blocks.0-11") and w.endswith("12") for w in words)
    assert re.search(r"embedding 768 =[A-Z]", told)
    assert "768 of patch_embed.proj = 768 of blocks.0-11.attn:dims.v (12x)" in told
    assert re.search(r"blocks\.0-11\.attn \(12x\) \(timm/models/beit\.py:\d+\)", told)
    assert "output of the model" in told
    assert len(path.read_bytes()) < 200_000
    again = tmp_path / "again.svg"
    save_drawing(timm_network("beit_base_patch16_224"), again, "BEiT <base>")
    assert again.read_bytes() == path.read_bytes()


def test_each_number_of_a_note_is_explained_at_the_foot() -> None:
    for name in ("swin", "hf_beit", "mobilenetv2"):
        _, pieces = texts(traced(name))
        lines = [t.get_text() for t in pieces]
        used = {n for line in lines if "stays:" not in line for n in re.findall(r"\[(\d+)\]", line)}
        told = {m[1] for line in lines if (m := re.match(r"\[(\d+)\]  stays: ", line))}
        assert used
        assert used <= told


@pytest.mark.parametrize("depth", [1, 1000])
def test_png_is_within_what_the_format_holds(depth: int, tmp_path: Path) -> None:
    widths = [3, *(2 + i % 7 for i in range(depth)), 2]
    layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    path = tmp_path / "folder" / "net.PNG"
    save_drawing(secateur.trace(nn.Sequential(*layers), torch.empty(1, 3)), path)
    png = path.read_bytes()
    assert png[:4] == b"\x89PNG"
    width, height = struct.unpack(">II", png[16:24])
    assert 300 < width < 4000
    assert 300 < height < 32_000


def test_a_network_of_which_nothing_may_go_is_drawn(tmp_path: Path) -> None:
    network = secateur.trace(nn.Linear(3, 4), torch.empty(1, 3))
    assert not network.groups
    save_drawing(network, tmp_path / "fixed.svg")
    assert "4 [" in (tmp_path / "fixed.svg").read_text()


def test_another_suffix_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for name in ("net.pdf", "net", "net.svg.gz"):
        with pytest.raises(secateur.InputError, match=r"does not end in \.svg or \.png"):
            save_drawing(traced("vit"), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_families_have_colours_of_their_own() -> None:
    for name in ("swin", "resnet50", "hf_beit"):
        network = traced(name)
        colours = drawing._colours(network)
        assert len(set(colours.values())) == len(network.families)
    many = timm_network("densenet121")
    assert set(drawing._colours(many)) == set(many.families)


def test_explanation_tells_layers_groups_ties_and_reasons_without_colour_codes() -> None:
    file = io.StringIO()
    Console(file=file, width=160).print(explain(timm_network("vit_tiny_patch16_224")))
    told = file.getvalue()
    assert "\x1b" not in told
    assert "blocks.0-11 (12 alike)" in told
    assert re.search(r"norm1 · attn.qkv +192 embedding +576: 384 head_dims.qk, 192 head_dims.v in heads", told)
    assert "blocks.0.mlp.fc1 (mlp): 768; alike are blocks.0-11.mlp.fc1 (12x)" in told
    assert "1 of blocks.0.mlp.fc2.weight[dim 1]" in told
    assert "3 x 64 of blocks.0.attn:dims.qk = 3 x 64 of blocks.0.attn:dims.v; likewise 11 more" in told
    assert re.search(r"\[\d\] meets a dimension .*: patch_embed.proj \(timm/layers/patch_embed.py:\d+\)", told)


@pytest.mark.parametrize("name", ["vit", "beit", "swin", "resnet50", "hf_deit"])
def test_what_goes_with_a_channel_is_all_that_it_occupies(name: str) -> None:
    network = traced(name)
    for group in network.groups:
        told = Counter[int]()
        for place in network.goes_with(group):
            found = re.fullmatch(r"(\d+) of \S+\[dim \d\](?: \((\d+)x\))?", place)
            assert found is not None, place
            told[int(found[1])] += int(found[2] or 1)
        assert told == Counter(n for _, n in group.members)


def test_explain_of_an_axis_tells_groups_equal_widths_attributes_and_reasons() -> None:
    network = timm_network("beit_base_patch16_224")
    rows = network.explain("blocks.3.attn.qkv.weight", 0)
    assert "1536 indices in blocks.3.attn:dims.qk" in rows
    assert "192 of blocks.3.attn.qkv.weight[dim 0]" in rows
    assert "1 of blocks.3.attn.relative_position_bias_table[dim 1]" in rows
    assert "keep equal widths: 768 of patch_embed.proj = 768 of blocks.0-11.attn:dims.v (12x)" in rows
    assert "sets blocks.3.attn.num_heads, 12 now" in rows
    assert "rescales 768 indices of blocks.3.attn.q_bias[dim 0]" in rows
    assert "blocks.4" not in rows
    embedding = network.explain("blocks.3.mlp.fc1.weight", 1)
    assert "1 of blocks.0-11.norm2.weight[dim 0] (12x)" in embedding
    assert "sets blocks.0-11.norm1.normalized_shape[0], 768 now (12x)" in embedding
    stays = network.explain("blocks.3.attn.relative_position_bias_table", 0)
    assert re.search(r"732 indices stay: .*; blocks\.3\.attn \(timm/models/beit\.py:\d+\)", stays)


def test_explain_refuses_unknown_names_and_dimensions_and_says_which_there_are() -> None:
    network = traced("vit")
    with pytest.raises(secateur.InputError, match=r"did you mean .*'blocks\.1\.mlp\.fc1\.weight'"):
        network.explain("blocks.1.mlp.fc1", 0)
    with pytest.raises(secateur.InputError, match=r"no dimension -1 of size above 1; it has 0 \(.* indices\) and 1"):
        network.explain("blocks.1.mlp.fc1.weight", -1)


def test_names_merge_only_where_they_differ_in_whole_numbers() -> None:
    names = [f"blocks.{i}.norm{j}.weight" for i in range(3) for j in (1, 2)]
    assert merged(names) == [("blocks.0-2.norm1.weight", " (3x)"), ("blocks.0-2.norm2.weight", " (3x)")]
    assert merged(["a.0.b.0", "a.0.b.1", "a.1.b.0"]) == [("a.*.b.*", " (3x)")]
    assert merged(["a.0", "a.2", "c"]) == [("a.0,2", " (2x)"), ("c", "")]
    assert merged(["blocks.0.attn:dims.v", "blocks.1.attn:dims.v"]) == [("blocks.0,1.attn:dims.v", " (2x)")]


def test_the_documents_quote_what_explain_says() -> None:
    said = timm_network("vit_tiny_patch16_224").explain("blocks.3.attn.qkv.weight", 0)
    page = (ROOT / "docs" / "explain.md").read_text("utf-8")
    assert "".join(f"    {line}\n" for line in said.splitlines()) in page


def test_the_drawing_in_the_documents_is_one() -> None:
    path = ROOT / "docs" / "explain.svg"
    told = path.read_text("utf-8")
    assert ElementTree.fromstring(told).tag.endswith("svg")
    assert "blocks.0-11" in told
    assert path.stat().st_size < 200_000
