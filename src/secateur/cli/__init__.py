"""The command line: `secateur trace | prune | demo | sweep | report | data`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from rich.console import Console

from secateur.errors import SecateurError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0, or 2 with one line on stderr for what the user can mend."""
    import tyro

    from secateur.cli.commands import Prune, Trace
    from secateur.cli.data import Data
    from secateur.cli.demo import Demo
    from secateur.cli.report import Report
    from secateur.cli.sweep import Sweep

    command = tyro.cli(
        tyro.conf.FlagCreatePairsOff[
            Annotated[Trace, tyro.conf.subcommand("trace")]
            | Annotated[Prune, tyro.conf.subcommand("prune")]
            | Annotated[Demo, tyro.conf.subcommand("demo")]
            | Annotated[Sweep, tyro.conf.subcommand("sweep")]
            | Annotated[Report, tyro.conf.subcommand("report")]
            | Annotated[Data, tyro.conf.subcommand("data")]
        ],
        prog="secateur",
        description="Cut trained vision models down to smaller dense ones, and show what that costs in accuracy.",
        args=arguments,
    )
    try:
        command(Console())
    except (SecateurError, OSError) as error:
        line = " ".join(f"secateur: error: {error}".split())
        Console(stderr=True).print(line, highlight=False, markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        Console(stderr=True).print("secateur: interrupted", highlight=False)
        return 130
    return 0
