"""Checkpoint 2.0 as the target of a conversion: what MindFormers loads, and reshards itself, from 1.9 on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from auto_trans.core.layout import Layout
from auto_trans.core.plan import FilePlan, Plan, TensorPlan
from auto_trans.core.saved import Place, SavedTensor, slice_numbers, with_axes
from auto_trans.core.strategy import Strategy, owner_of
from auto_trans.core.tensor import Shape
from auto_trans.errors import LayoutError
from auto_trans.log import logger
from auto_trans.storage.checkpoint2.common import Common
from auto_trans.storage.checkpoint2.metadata import format_metadata
from auto_trans.storage.files import new_file, write_json
from auto_trans.storage.formats import FORMATS
from auto_trans.storage.manifest import MANIFEST_NAME
from auto_trans.storage.names import COMMON_NAME, METADATA_NAME, TRACKER_NAME
from auto_trans.storage.targets import Target, contents, refuse

__all__ = ["Iteration"]

_KINDS = ("model", "opt")  # by the part of a rank's files


class _Sliced(NamedTuple):
    """A parameter of the target, for metadata.json.

    Attributes:
        dtype: MindSpore's name of its type.
        shape: Full shape.
        layout: How it is sliced.
        stage: The first stage that holds it.
        part: The part of a rank's files that it is in.
    """

    dtype: str
    shape: Shape
    layout: Layout
    stage: int
    part: int


class Iteration(Target):
    """``iteration_NNNNNNNN/{prefix-}model-*.safetensors`` and ``opt-*`` of every rank, below the file that names it.

    Beside them lie metadata.json, which tells how the parameters are sliced (a target of one rank has none), and common.json
    with the numbers that a job goes on from. The tracker file is written last of all.

    Args:
        folder: The folder that gets the iteration and the tracker file.
        request: Digest of everything that the files are made from.
        strategy: Strategy of the target.
        number: The iteration.
        common: The numbers of common.json.
        prefix: Beginning of the files' names, without the dash after it; may be empty.
        reuse: Keep files that are there already and were made for the same request.
        durable: Whether files must be on the disk before they get their names.
    """

    def __init__(
        self,
        folder: Path,
        request: str,
        strategy: Strategy,
        number: int,
        common: Common,
        *,
        prefix: str = "",
        reuse: bool = True,
        durable: bool = True,
    ) -> None:
        super().__init__(folder, FORMATS["safetensors"], request, strategy.world_size, reuse=reuse, durable=durable)
        self._strategy, self._number, self._common = strategy, number, common
        self._prefix = f"{prefix}-" if prefix else ""
        self._names: list[str] = []
        self._sliced: dict[str, _Sliced] = {}

    @property
    def _iteration(self) -> str:
        return f"iteration_{self._number:08d}"

    def arrange(self, plan: Plan) -> tuple[FilePlan, ...]:
        """A file of the model and one of the optimizer for every rank, see `Target`.

        Raises:
            LayoutError: A parameter is sliced in a way that metadata.json cannot tell.
        """
        weights = {tensor.name for file in plan.files for tensor in file.tensors}
        states = {name for name in weights if owner_of(name, weights)}
        if states:
            states.add("global_step")
            if self._common.global_step is None:  # MindFormers loads no optimizer without it
                self._common = replace(self._common, global_step=self._number)
        carried, files = set(plan.carried), []
        self._sliced = {}
        for file in plan.files:
            parts: tuple[list[TensorPlan], ...] = ([], [])
            for tensor in file.tensors:
                part = int(tensor.name in states)
                parts[part].append(tensor)
                if tensor.name not in carried and tensor.name not in self._sliced:
                    self._sliced[tensor.name] = self._slice(tensor, self._strategy.stage_of(file.ranks[0]), part)
            files += [FilePlan(file.ranks, tuple(tensors), part) for part, tensors in enumerate(parts) if tensors]
        self._names = [name for file in files for name in self.names(file)]
        return tuple(files)

    def name(self, rank: int, part: int) -> str:
        """Name of a rank's file of a kind, see `Target`."""
        return f"{self._iteration}/{self._file(rank, part)}"

    def folders(self, files: Iterable[FilePlan]) -> set[Path]:
        """The folder of the iteration, see `Target`."""
        return {self.folder / self._iteration}

    def check(self, files: Iterable[FilePlan]) -> None:
        """Refuses whatever else lies in the folder or in that of the iteration, see `Target`."""
        ours = {name for name in self._names if self._manifest.done(name)}
        if ours:
            ours |= {MANIFEST_NAME, TRACKER_NAME, self._iteration}
            ours |= {f"{self._iteration}/{name}" for name in (METADATA_NAME, COMMON_NAME)}
        for prefix, folder in (("", self.folder), (f"{self._iteration}/", self.folder / self._iteration)):
            there = (file for file in contents(folder) if not file.name.startswith("."))
            foreign = (file for file in there if f"{prefix}{file.name}" not in ours)
            refuse(next((file for file in foreign if prefix or file.name != self._iteration), None))
        self._refuse_rival()

    def finish(self) -> bool:
        """Writes metadata.json and common.json, the manifest, and last of all the tracker file. See `Target`."""
        self._manifest.refresh()
        if not all(self._manifest.done(name) for name in self._names):
            return False
        if self._strategy.world_size > 1:
            with new_file(self.folder / self._iteration / METADATA_NAME, durable=self._durable) as out:
                out.write(json.dumps(format_metadata(self._saved()), separators=(",", ":")).encode())
        write_json(self.folder / self._iteration / COMMON_NAME, self._common.as_json(), durable=self._durable)
        if not self._manifest.finish(self._names):
            return False
        with new_file(self.folder / TRACKER_NAME, durable=self._durable) as out:
            out.write(str(self._number).encode())
        lacking = [
            name for name in ("epoch_num", "step_num", "global_batch_size") if getattr(self._common, name) is None
        ]
        if lacking:
            logger.warning(
                "the source does not tell %s: MindFormers cannot go on from the step of these weights, only load them with "
                "no_load_optim: True",
                ", ".join(lacking),
            )
        return True

    def _file(self, rank: int, part: int) -> str:
        return f"{self._prefix}{_KINDS[part]}-{rank:07d}-{self._strategy.world_size:07d}.safetensors"

    def _slice(self, tensor: TensorPlan, stage: int, part: int) -> _Sliced:
        """How a parameter is sliced; what the strategy does not list, every rank holds whole."""
        layout = self._strategy.layout(tensor.name, stage) or Layout.whole(self._strategy.stage_devices)
        try:
            return _Sliced(tensor.dtype, tensor.tensor.shape, with_axes(layout), stage, part)
        except LayoutError as e:
            raise LayoutError(f"{self._strategy.origin}: parameter {tensor.name}: {e}") from e

    def _saved(self) -> Iterator[SavedTensor]:
        """What metadata.json tells: of a parameter that several stages hold, that of the first."""
        devices = self._strategy.stage_devices
        for name, (dtype, shape, layout, stage, part) in self._sliced.items():
            ranks = tuple(range(stage * devices, (stage + 1) * devices))
            numbers = slice_numbers(layout, len(shape))
            places: list[list[Place]] = [[] for _ in range(max(numbers) + 1)]
            for rank, number in zip(ranks, numbers):
                places[number].append(Place(self._file(rank, part), rank))
            yield SavedTensor(name, dtype, shape, layout, ranks, places)
