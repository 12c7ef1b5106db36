"""Trains the base models of the demo on the source domains of digits-dg and writes their weights.

    python scripts/train_base_models.py                             # what is shipped
    python scripts/train_base_models.py --models vit_digits --unseen plain

A transformer learns little from the 1,078 training images of three source domains alone, so every training digit is
drawn `copies` times in each source domain, slightly turned, stretched and sheared each time. Nothing else is used:
neither digits of the validation part nor of the unseen domain, nor pictures in the manner of the unseen domain.
Training takes a quarter of an hour per model on one core.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import tyro
from safetensors.torch import save_file
from scipy import ndimage
from torch import Tensor, nn

from secateur.data import DataConfig, Split, TensorImages, load_split
from secateur.data.digits import DOMAINS, Floats, render, source_digits
from secateur.experiments.base_models import BASE_MODELS, base_model, weights_file
from secateur.training import FinetuneConfig, FinetuneProgress, evaluate, finetune_

WEIGHTS = Path(__file__).resolve().parent.parent / "src" / "secateur" / "experiments" / "weights"


class Redrawn(TensorImages):
    """Images kept as bytes and normalised when asked for."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index].float() / 127.5 - 1.0, int(self.labels[index])


def jittered(glyph: Floats, rng: np.random.Generator) -> Floats:
    """Returns a glyph (8 x 8) turned by up to 14 degrees, stretched by up to 15 % and sheared by as much."""
    angle = rng.uniform(-0.25, 0.25)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    shape = np.array([[rng.uniform(0.9, 1.15), 0.0], [rng.uniform(-0.15, 0.15), rng.uniform(0.9, 1.15)]])
    matrix = turn @ shape
    middle = np.array([3.5, 3.5])
    return np.clip(ndimage.affine_transform(glyph, matrix, middle - matrix @ middle, order=1), 0.0, 1.0)


def redrawn(split: Split, copies: int) -> Redrawn:
    """Returns every training digit drawn `copies` times in each of the source domains."""
    glyphs, labels = source_digits()
    sources = [int(i.rsplit("/", 1)[1]) for i in split.train.ids]
    pictures, ids = [], []
    for copy in range(copies):
        for source in sources:
            for domain in split.domains:
                rng = np.random.default_rng([1, copy, source, DOMAINS.index(domain)])
                pictures.append(render(jittered(glyphs[source], rng), domain, rng))
                ids.append(f"{domain}/{labels[source]}/{source:04d}-{copy}")
    classes = torch.tensor([int(i.split("/")[1]) for i in ids])
    return Redrawn(torch.from_numpy(np.stack(pictures)), classes, ids, [i.split("/")[0] for i in ids], size=32)


def saved(model: nn.Module, name: str, unseen: str | None, config: FinetuneConfig, out: Path) -> Path:
    """Writes the weights as 16-bit floats and returns the file."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / weights_file(name, unseen)
    about = {"model": name, "data": "digits-dg", "unseen": str(unseen), "split_seed": "0", "recipe": str(config)}
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, path, metadata=about)
    return path


def main(
    models: tuple[str, ...] = tuple(BASE_MODELS),
    unseen: tuple[str, ...] = ("thick",),
    pooled: bool = False,
    copies: int = 36,
    epochs: int = 8,
    out: Path = WEIGHTS,
) -> None:
    """Trains each of `models` for each domain of `unseen` (and the pooled split) and writes the weights to `out`."""
    configs = [DataConfig(unseen=u) for u in unseen] + [DataConfig(split="iid_pooled")] * pooled
    recipe = FinetuneConfig(epochs=epochs, batch_size=128, lr=1e-3, warmup_epochs=0.1)
    with FinetuneProgress(len(models) * len(configs)) as progress:
        for data in configs:
            split = load_split("digits-dg", data)
            train = redrawn(split, copies)
            for name in models:
                model = base_model(name, split.unseen, weights=False)
                label = f"{name}, unseen {split.unseen}"
                record = finetune_(model, replace(split, train=train), recipe, progress=progress.run(label))
                path = saved(model, name, split.unseen, recipe, out)
                model.load_state_dict({k: v.half().float() for k, v in model.state_dict().items()})
                val, test = (evaluate(model, part, num_classes=10) for part in (split.val, split.test))
                print(f"{path.name}: val {val:.1f} %, test {test:.1f} % ({record})", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
