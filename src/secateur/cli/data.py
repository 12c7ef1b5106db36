"""The commands around data sets: `secateur data list | prepare | split | picture`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import OmitSubcommandPrefixes, Positional, arg, subcommand

from secateur.data.protocol import SplitName
from secateur.errors import DataError, InputError


@dataclass(frozen=True)
class DataList:
    """List the benchmarks that can be prepared: domains, classes, images, and what to download."""

    def __call__(self, console: Console) -> None:
        """Prints them one by one."""
        from secateur.data import BENCHMARKS

        for benchmark in BENCHMARKS.values():
            console.print(f"[bold]{benchmark.name}[/bold]  {benchmark.title}", highlight=False)
            for version, counts in benchmark.counts.items():
                listed = ", ".join(f"{domain} {count:,}" for domain, count in sorted(counts.items()))
                console.print(f"  {benchmark.num_classes} classes, {version}: {listed}", highlight=False, markup=False)
            console.print(f"  download: {benchmark.origin}\n", highlight=False, markup=False)


@dataclass(frozen=True)
class DataPrepare:
    """Convert a downloaded benchmark to domain/class/image with a manifest; the same command goes on after a stop."""

    name: Annotated[Positional[str], arg(metavar="NAME")]
    """Which benchmark; `secateur data list` names them."""
    source: Path
    """The folder or archive that was downloaded, or a folder of such archives; it is only read."""
    out: Path
    """The folder to write; a new one."""
    skip_bad: bool = False
    """Leave out files that are no images or damaged, accept other numbers of images, and say so in the manifest."""

    def __call__(self, console: Console) -> None:
        """Converts with a progress bar and prints what the manifest says; lists problems on stderr."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from secateur.data import prepare

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        try:
            with Progress(*columns, console=console, transient=True) as bar:
                task = bar.add_task(self.name, total=None)
                manifest = prepare(
                    self.name,
                    self.source,
                    self.out,
                    self.skip_bad,
                    progress=lambda done, total: bar.update(task, completed=done, total=total),
                )
        except DataError as error:
            summary, *problems = str(error).splitlines()
            for problem in problems:
                Console(stderr=True).print(problem, highlight=False, markup=False, soft_wrap=True)
            raise DataError(summary.removesuffix(":")) from error
        console.print(f"{manifest}\nwrote {self.out}", highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class DataSplit:
    """Split a data set and write which image is in which part to a file, so that others can use the same."""

    data: Annotated[Positional[str], arg(metavar="DATA")]
    """digits-dg, a folder domain/class/image, hf:NAME, or a folder saved by the library datasets."""
    out: Path
    """The JSON file to write."""
    split: SplitName = "leave_one_out"
    """How: see the documentation of data sets."""
    unseen: str | None = None
    """The domain that is tested on and never trained on."""
    seed: int = 0
    """Chooses the hold-out."""
    val_fraction: float | None = None
    """Share of images to hold out for validation; default: 0.2, or 0.1 of an official training part."""
    domain_column: str = "domain"
    """The column of a Hugging Face data set that names the domain."""

    def __call__(self, console: Console) -> None:
        """Writes the split and says what it is."""
        from secateur.data import DataConfig, load_split, save_split

        if self.out.exists():
            raise InputError(f"{self.out} exists; a stored split is not overwritten")
        config = DataConfig(
            unseen=self.unseen,
            split=self.split,
            seed=self.seed,
            val_fraction=self.val_fraction,
            domain_column=self.domain_column,
        )
        split = load_split(self.data, config)
        save_split(split, self.out)
        console.print(f"{split}\nwrote {self.out}", highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class DataPicture:
    """Write a picture of digits-dg: examples of every class in every domain."""

    out: Path = Path("digits-dg.png")
    """The PNG to write."""

    def __call__(self, console: Console) -> None:
        """Writes the contact sheet."""
        from secateur.data import save_contact_sheet

        console.print(f"wrote {save_contact_sheet(self.out)}", highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Data:
    """Prepare benchmarks, split data sets, see digits-dg."""

    command: OmitSubcommandPrefixes[
        Annotated[DataList, subcommand("list")]
        | Annotated[DataPrepare, subcommand("prepare")]
        | Annotated[DataSplit, subcommand("split")]
        | Annotated[DataPicture, subcommand("picture")]
    ]

    def __call__(self, console: Console) -> None:
        """Runs the command that was named."""
        self.command(console)
