"""Prunes the smallest member of each timm family with secateur and with Torch-Pruning 1.6.1, and says what came of it.

Both halve the same random model in a process of its own, one image of the published size as example, without a line
about any model: `secateur.prune_` (which includes its check), and `BasePruner` as in its own example for timm models.
Then both pruned models are held to the same: fewer parameters, a forward run with the old output shape, a step of
training. Times are processor seconds of one core, so that a busy machine does not change who is over the limit.

What is measured is appended to one file for each library in `--results`; what is there already is not measured again,
so an interrupted run goes on, and deleting lines (or a file) measures them anew. Takes about an hour.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch

from bench import build, num_params, prune_by_peer, secateur_prune
from secateur.graph.copies import output_tensors
from zoo.families import smallest_member

LIBRARIES: dict[str, Callable[[Any, torch.Tensor], None]] = {
    "secateur": secateur_prune,
    "torch-pruning": prune_by_peer,
}
CPU_SECONDS = 120
UNPRUNED = 0.95
"""A model with more than this fraction of its parameters left counts as unpruned."""


@dataclass(frozen=True)
class Outcome:
    """What came of one model: `result` is `pruned` or what went wrong, with the first line of its error if it has one.

    `seconds` and `left`, the fraction of parameters left, are None where pruning did not come to its end.
    """

    family: str
    member: str
    result: str
    detail: str = ""
    seconds: float | None = None
    left: float | None = None


def shapes(model: Any, x: torch.Tensor) -> list[torch.Size]:
    with torch.no_grad():
        return [t.shape for t in output_tensors(model(x))]


def train_one_step(model: Any, x: torch.Tensor) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    outputs = [t for t in output_tensors(model(x)) if t.requires_grad]
    torch.stack([t.square().mean() for t in outputs]).sum().backward()
    optimizer.step()


def limit_cpu(seconds: float) -> None:
    """Lets this process live for so many more processor seconds."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = int(time.process_time() + seconds) + 1 if seconds < float("inf") else hard
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def prune_and_check(library: str, name: str) -> dict[str, Any]:
    """Returns the fields of an `Outcome` for one model, in this fresh process; ends it if pruning takes too long."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, image = build(name)
    two = torch.cat([image, image.flip(-1)])
    before, expected = num_params(model), shapes(model, two)
    stage = "raised"
    done: dict[str, Any] = {}
    try:
        limit_cpu(CPU_SECONDS)
        start = time.process_time()
        LIBRARIES[library](model, image)
        done["seconds"] = time.process_time() - start
        limit_cpu(float("inf"))
        done["left"] = num_params(model) / before
        stage = "broken forward"
        model.eval()
        if (found := shapes(model, two)) != expected:
            return done | {"result": "output changed", "detail": f"{found[0]} instead of {expected[0]}"}
        if done["left"] > UNPRUNED:
            return done | {"result": "unpruned"}
        stage = "broken training"
        train_one_step(model, two)
    except Exception as error:  # noqa: BLE001  (whatever goes wrong is the result)
        return done | {"result": stage, "detail": f"{type(error).__name__}: {error}".splitlines()[0]}
    return done | {"result": "pruned"}


def send_outcome(answer: Connection, library: str, name: str) -> None:
    answer.send(prune_and_check(library, name))


def measure(library: str, family: str, name: str) -> Outcome:
    """Returns the outcome of one library on one model, whatever becomes of the process that tries."""
    context = get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=send_outcome, args=(send, library, name))
    process.start()
    send.close()
    try:
        fields: dict[str, Any] = receive.recv()
    except EOFError:
        process.join()
        timed_out = process.exitcode == -signal.SIGXCPU
        fields = {"result": "timed out"} if timed_out else {"result": "crashed", "detail": f"exit {process.exitcode}"}
    process.join()
    return Outcome(family, name, **fields)


def read(path: Path) -> dict[str, Outcome]:
    """Returns what was measured before, by family."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {outcome.family: outcome for outcome in (Outcome(**json.loads(line)) for line in lines)}


def cells(outcome: Outcome | None) -> list[str]:
    if outcome is None:
        return ["not tried", "", ""]
    detail = outcome.detail.replace("|", "\\|")
    result = f"{outcome.result}: {detail[:100]}" if detail else outcome.result
    left = "" if outcome.left is None else f"{outcome.left:.1%}"
    return [result, left, "" if outcome.seconds is None else f"{outcome.seconds:.1f}"]


def table(found: dict[str, dict[str, Outcome]]) -> str:
    """Returns totals and the table, as Markdown."""
    members = {o.family: o.member for outcomes in found.values() for o in outcomes.values()}
    lines = [
        f"The smallest member of each of {len(members)} timm families, pruned by half with secateur and with "
        f"Torch-Pruning {version('torch-pruning')} (TP); timm {timm.__version__}, torch {torch.__version__}, one core "
        f"of {platform.machine()}, at most {CPU_SECONDS} processor seconds. Pruned: at least {1 - UNPRUNED:.0%} of the "
        "parameters gone, the output still of its shape, one step of training done. Made by `make peer`.",
        "",
    ]
    for library, outcomes in found.items():
        counts = Counter(o.result for o in outcomes.values()).most_common()
        lines.append(f"- **{library}**: {', '.join(f'{count} {result}' for result, count in counts)}")
    lines += ["", "| family | member | secateur | left | s | TP | left | s |", "|---|---|---|--:|--:|---|--:|--:|"]
    for family, member in sorted(members.items()):
        row = [family, member, *(cell for outcomes in found.values() for cell in cells(outcomes.get(family)))]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("docs/coverage"), help="folder of the measurements")
    parser.add_argument("--write", type=Path, default=Path("docs/coverage-table.md"))
    parser.add_argument("--families", nargs="+", default=timm.list_modules())
    args = parser.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)
    paths = {library: args.results / f"{library}.jsonl" for library in LIBRARIES}
    for family in args.families:
        for library, path in paths.items():
            if family in read(path):
                continue
            outcome = measure(library, family, smallest_member(family))
            print(family, outcome.member, library, *cells(outcome), flush=True)
            with path.open("a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
        args.write.write_text(table({library: read(path) for library, path in paths.items()}))


if __name__ == "__main__":
    main()
