"""Do a source, its strategy and the network that loads it belong together?

Strategy files hold no shapes: a strategy of the right names but another slicing makes slices up to tensors of wrong shapes.
What contradicts itself is refused here; for certain only the network tells.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from auto_trans.core.heads import Heads, Stored
from auto_trans.core.rules import NOTHING, Allowed, kind_of
from auto_trans.core.source import Source
from auto_trans.core.strategy import Strategy, is_optimizer_state, owner_of
from auto_trans.core.tensor import FLOAT_TYPES, Shape
from auto_trans.errors import PlanError

__all__ = ["Network", "check_heads", "check_known", "check_names", "check_network", "check_shapes", "shapes_of_slice"]

# the moments of AdamW and Adam; other optimizers keep sums of rows and columns
_LIKE_THEIR_WEIGHT = ("adam_m.", "adam_v.", "moment1.", "moment2.", "moments.")
# the matrices of a feed-forward: into it, and back
_FEED_FORWARD = [
    (f".{up}.weight", f".{down}.weight")
    for up, down in (("w1", "w2"), ("w3", "w2"), ("gate_proj", "down_proj"), ("up_proj", "down_proj"))
]
# the matrices that lead from words to numbers and back
_VOCABULARY = re.compile(
    r"(?:tok_embeddings|embed_tokens|word_embeddings|wte|lm_head|output_layer|head)\.(?:embedding_)?(?:weight|table)$"
)
# up to the number of a layer
_LAYER = re.compile(r".*?(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")


def check_shapes(source: Source, allowed: Allowed = NOTHING) -> None:
    """Compares the full shapes that the source strategy makes of the slices: do they make up one model?

    A strategy of the right names but another slicing multiplies slices by the wrong numbers. Optimizer moments have the
    shape of their weight, a bias has the length of a dimension of its weight, the layers of a model are alike, what a layer
    normalizes has the length of a dimension of one of its matrices, a feed-forward leads back to where it began, and the
    vocabulary is not a multiple of itself. A strategy that passes all that can still be wrong; for certain only the network
    tells, see `check_network`. Packed integers have shapes of their own and are passed over, as is what is allowed.

    Raises:
        PlanError: They contradict each other.
    """
    strategy = source.strategy
    names = [
        name
        for name in source.names
        if strategy.lists(name)
        and name not in strategy.refused
        and source.tensor(name).dtype in FLOAT_TYPES
        and not any(fnmatchcase(name, pattern) for pattern in allowed.extra)
    ]
    known = set(names)
    first: dict[tuple[str, Shape], str] = {}
    for name in names:
        weight = owner_of(name) if name.startswith(_LIKE_THEIR_WEIGHT) else ""
        if weight in known:
            _check_equal(source, name, weight)
        # layers of the same kind whose ranks hold slices of the same shape are of the same shape as a whole
        _check_equal(source, name, first.setdefault((kind_of(name), source.held_shape(name)), name))
        _check_bias(source, name, known)
        _check_feed_forward(source, name, known)
    _check_norms(source, names)
    _check_vocabulary(source, names)


def _check_bias(source: Source, name: str, known: Container[str]) -> None:
    weight = name[: -len(".bias")] + ".weight" if name.endswith(".bias") else ""
    if weight in known and not {*source.tensor(name).shape, 1} <= {*source.tensor(weight).shape, 1}:
        raise _contradiction(source, name, weight)


def _check_feed_forward(source: Source, name: str, known: Container[str]) -> None:
    """Where a feed-forward begins it ends; in between it may be fused with its gate."""
    back = next((name[: -len(up)] + down for up, down in _FEED_FORWARD if name.endswith(up)), "")
    into = source.tensor(name).shape
    if back in known and len(into) == 2:
        out = source.tensor(back).shape
        if into[1] != out[0] and into[0] != out[1]:
            raise _contradiction(source, name, back)


def _check_norms(source: Source, names: Iterable[str]) -> None:
    """In every layer the length of one of its norms is a dimension of one of its matrices."""
    norms: dict[str, list[str]] = {}
    matrices: dict[str, list[str]] = {}
    for name in names:
        found = _LAYER.match(name)
        if found is not None and not is_optimizer_state(name):
            ndim = len(source.tensor(name).shape)
            if ndim > 1:
                matrices.setdefault(found.group(), []).append(name)
            elif ndim == 1 and "norm" in name.lower():
                norms.setdefault(found.group(), []).append(name)
    for layer in norms.keys() & matrices.keys():
        lengths = {n for name in matrices[layer] for n in source.tensor(name).shape}
        if not any(source.tensor(name).shape[0] in lengths for name in norms[layer]):
            raise _contradiction(source, norms[layer][0], matrices[layer][0])


def check_names(source: Source, heads: Heads) -> None:
    """Every parameter of every file is one that the source knows.

    Raises:
        PlanError: What no strategy lists lies with some ranks only.
    """
    known = set(source.names)
    for rank in heads.ranks:
        for name in heads.tensors(rank):
            if name not in known and not source.strategy.lists(name):
                raise PlanError(
                    f"parameter {name} is in {heads.describe(rank)}, but not in the first file of its stage, and the "
                    f"strategy {source.strategy.origin} does not list it: the files are of different jobs or steps; copy "
                    f"those of one («src»)"
                )


def check_heads(strategy: Strategy, heads: Heads) -> None:
    """Compares what the files of all ranks hold: under one strategy slices of a parameter are alike on all ranks of a stage.

    Raises:
        PlanError: A rank holds something else.
    """
    first: dict[tuple[str, int], tuple[int, Stored]] = {}
    for rank in heads.ranks:
        stage = strategy.stage_of(rank)
        for name, stored in heads.tensors(rank).items():
            if not strategy.lists(name):
                continue
            other, expected = first.setdefault((name, stage), (rank, stored))
            if (stored.shape, stored.dtype) != (expected.shape, expected.dtype):
                raise PlanError(
                    f"parameter {name} is {list(expected.shape)} {expected.dtype} in {heads.describe(other)} but "
                    f"{list(stored.shape)} {stored.dtype} in {heads.describe(rank)}, which the strategy {strategy.origin} "
                    f"does not tell apart: the files are of different jobs or steps; copy those of one («src»)"
                )


def _check_vocabulary(source: Source, names: Iterable[str]) -> None:
    """The matrices that lead into and out of a model have as many rows, unless one is padded a little."""
    rows: dict[int, dict[int, str]] = {}
    for name in names:
        shape = source.tensor(name).shape
        if len(shape) == 2 and not is_optimizer_state(name) and _VOCABULARY.search(name):
            rows.setdefault(shape[1], {})[shape[0]] = name
    for found in rows.values():
        few, many = min(found), max(found)
        if few < many and many % few == 0:
            raise _contradiction(source, found[many], found[few])


@dataclass(frozen=True)
class Network:
    """What is known of the network that will load the target.

    Attributes:
        shapes: Parameter -> its shape.
        sliced: Whether it was compiled for this rank, so that a parameter may have the shape of a slice; what belongs to
            other stages keeps its full shape.
    """

    shapes: Mapping[str, Shape]
    sliced: bool = False

    def expects(self, name: str, full: Shape, parts: Collection[Shape]) -> bool:
        """Whether a parameter can be loaded.

        Args:
            name: The parameter.
            full: Its full shape.
            parts: The shapes of a rank's slice, after and before optimizer shard.
        """
        shape = self.shapes.get(name)
        return shape is None or shape == full or (self.sliced and shape in parts)


def check_network(network: Network, tensors: Iterable[tuple[str, Shape, Collection[Shape]]], origin: str) -> None:
    """Compares what a plan makes with the network that will load it.

    Args:
        network: The network.
        tensors: Name, full shape and shapes of a slice, after and before optimizer shard, of what is made.
        origin: The source strategy, for the message.

    Raises:
        PlanError: The plan makes something else of a parameter.
    """
    for name, full, parts in tensors:
        if not network.expects(name, full, parts):
            sliced = " or ".join(str(list(part)) for part in parts)
            raise PlanError(
                f"parameter {name} is {list(network.shapes[name])} in the network, but by the source strategy {origin} its "
                f"slices make up {list(full)} ({sliced} on a rank): that is not the strategy that the weights were saved "
                f"under; set «src_strategy» to the one in the output of the job that saved them"
            )


def check_known(network: Network, names: Iterable[str], where: str) -> None:
    """Looks whether a network knows any of the parameters that it is to load.

    Args:
        network: The network.
        names: What there is to load, by the network's names.
        where: Where it lies, for the message.

    Raises:
        PlanError: It knows none, so that nothing would be loaded.
    """
    theirs = "none"
    for i, name in enumerate(names):
        if not network.shapes or name in network.shapes:
            return
        theirs = name if i == 0 else theirs
    if network.shapes:
        ours = next(iter(network.shapes))
        raise PlanError(
            f"{where} holds no parameter of the network ({theirs}, ... instead of {ours}, ...): it is of another model; set "
            f"«src» to weights of this one"
        )


def shapes_of_slice(strategy: Strategy, name: str, full: Shape) -> list[Shape]:
    """The shapes that a rank's slice of a parameter may have, after and before optimizer shard."""
    shapes = []
    for stage in strategy.stages_of(name):
        layout = strategy.layout(name, stage)
        if layout is not None:
            before = tuple(n // count for n, count in zip(full, layout.split(len(full))))
            shapes += [layout.slice_shape(full), before]
    return list(dict.fromkeys(shapes)) or [full]


def _check_equal(source: Source, name: str, other: str) -> None:
    if source.tensor(name).shape != source.tensor(other).shape:
        raise _contradiction(source, name, other)


def _contradiction(source: Source, name: str, other: str) -> PlanError:
    one, two = source.tensor(name), source.tensor(other)
    return PlanError(
        f"by the source strategy {source.strategy.origin} parameter {name} is {list(one.shape)} as a whole and {other} "
        f"{list(two.shape)}, which contradict each other: it is not the strategy that the weights were saved under; give "
        f"the one in the output of the job that saved them («src_strategy»), or, if the model really is so, name the "
        f"parameter with «allow_extra»"
    )
