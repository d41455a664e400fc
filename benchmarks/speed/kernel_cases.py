"""The rows of ``bench_kernels.py``: shapes, implementations, and compilation ahead of time."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks import unets
from benchmarks.peers import linears
from benchmarks.speed.kernel_sides import BASELINE, BASELINES, CHAINS, OURS, Side, layer_side
from benchmarks.unets import LayerShape

UNETS = ("sd15", "sdxl")
SUBSET = 12  # shapes per UNet, unless all are selected
FEW_ROWS = 256  # with fewer rows a GEMM has less than two tiles of 128 rows

TINY = (  # layers of no UNet, for trial runs
    LayerShape("conv2d", 2, 64, 64, 8, 8, (3, 3), (1, 1), (1, 1), ("conv",)),
    LayerShape("linear", 2, 64, 512, 64, 1, names=("gate",)),
    LayerShape("linear", 2, 64, 64, 1, 1, names=("a.time_emb_proj", "b.time_emb_proj")),
)


@dataclass(frozen=True)
class Case:
    """One row: one implementation of a layer, or of a chain if ``chain`` names one of ``CHAINS``.

    ``shapes`` is the layer, or for a chain all layers of the UNet, which determine its sizes.
    """

    unet: str
    shapes: tuple[LayerShape, ...]
    implementation: str
    chain: str | None = None

    @property
    def kind(self) -> str:
        return "chain" if self.chain else self.shapes[0].kind

    @property
    def group(self) -> str:
        """The name of the layer or chain, equal for all implementations that are compared."""
        what = self.chain or self.shapes[0].label
        return f"{self.unet}, batch {self.shapes[0].batch}: {what}"


def representative(shapes: Sequence[LayerShape], count: int = SUBSET) -> list[LayerShape]:
    """The shapes with few rows, one per kind and number of tokens, then the shapes with most of the FLOPs.

    A shape's FLOPs are the sum over all layers with it. Of several shapes with few rows, the largest is taken.
    """
    by_share = sorted(shapes, key=lambda shape: -shape.operations * len(shape.names))
    few_rows: dict[tuple[str, int], LayerShape] = {}
    for shape in by_share:
        if shape.rows < FEW_ROWS:
            few_rows.setdefault((shape.kind, shape.tokens), shape)
    chosen = list(few_rows.values())
    return chosen + [shape for shape in by_share if shape not in chosen][: max(0, count - len(chosen))]


def cases(full: bool, tiny: bool) -> list[Case]:
    """All rows: layers of ours and of the baselines, then chains, then other libraries' linears.

    An interrupted run so has the most important rows. ``full`` selects every shape, at batch 2 and 8, otherwise the
    representative shapes are selected.
    """
    present = [name for name in linears.PEERS if linears.missing(name) is None]
    layers, chains, others = [], [], []
    for unet in ("tiny",) if tiny else UNETS:
        for batch in (2, 8) if full and not tiny else (2,):
            shapes = TINY if tiny else tuple(unets.layers(unet, batch))
            for shape in shapes if full else representative(shapes):
                layers += [Case(unet, (shape,), name) for name in (OURS, *BASELINES)]
                others += [Case(unet, (shape,), name) for name in present if shape.kind == "linear"]
            chains += [Case(unet, shapes, name, chain) for chain in CHAINS for name in (OURS, BASELINE)]
    return layers + chains + others


def prepare(case: Case) -> Side:
    """The row's implementation with new tensors, which have the same values at every call."""
    torch.manual_seed(0)
    if case.chain is None:
        return layer_side(case.shapes[0], case.implementation)
    ours, baseline = CHAINS[case.chain](case.shapes)
    return ours if case.implementation == OURS else baseline


def _compile(share: list[Case]) -> None:
    """Calls each row once, to fill Triton's cache on disk; runs in a separate process."""
    for case in share:
        try:
            prepare(case).run()
            torch.cuda.synchronize()
        except Exception as error:  # the row itself will fail with a better report
            print(f"{case.group}: {error!r}"[:300], flush=True)


def compile_kernels(rows: Sequence[Case], seconds: float = 60.0) -> None:
    """Compiles our kernels in parallel for at most ``seconds``; the others compile at their first call."""
    ours = [case for case in rows if case.implementation == OURS]
    processes = max(1, min(12, (os.cpu_count() or 1) - 1, len(ours)))
    context = multiprocessing.get_context("spawn")  # a fork would share the CUDA context
    workers = [context.Process(target=_compile, args=(ours[i::processes],), daemon=True) for i in range(processes)]
    deadline = time.monotonic() + seconds
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
        if worker.is_alive():
            worker.kill()
            worker.join()
