"""Locate a checkpoint's tensors in the running network: its decoder blocks, and a view of every weight.

The location of a tensor is given by transformers' own mapping of names (:mod:`fewbit.architecture.names`). The values
in the network must be equal to those in the file; otherwise an error is raised.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewbit.architecture.content import Spot, find_rows, same
from fewbit.architecture.coverage import WeightTensor, name_in_block
from fewbit.architecture.names import Target
from fewbit.architecture.owners import refuse_owner
from fewbit.curvature.observe import Watched
from fewbit.errors import FewbitError

Weights = Callable[[WeightTensor], Tensor]
"""Reads a tensor of the checkpoint as a matrix `(out, in)`, with experts stacked along the rows."""


@dataclass(frozen=True)
class Site:
    """A weight of the checkpoint inside the network.

    watched: the matrix that is one linear layer for the network. first, rows: which of its output rows belong to this
    weight. transposed: the network stores it as (in, out). order: the index of each output row, if they are not
    consecutive.
    """

    tensor: WeightTensor
    watched: Watched
    first: int
    rows: int
    transposed: bool
    order: Tensor | None = None

    @property
    def columns(self) -> int:
        """Number of inputs of the layer."""
        return self.tensor.matrix_shape[1]

    def _matrix(self) -> Tensor:
        matrix = self.watched.weight.detach()
        return matrix.t() if self.transposed else matrix

    def read(self) -> Tensor:
        """The weight `(out, in)`; a view of the network's parameter if its rows are consecutive."""
        if self.order is not None:
            return self._matrix()[self.order]
        return self._matrix()[self.first : self.first + self.rows]

    def write(self, weight: Tensor) -> None:
        """Put a weight `(out, in)` of any dtype into the network."""
        with torch.no_grad():
            matrix = self._matrix()
            if self.order is not None:
                matrix[self.order] = weight.to(matrix.device, matrix.dtype)
            else:
                matrix[self.first : self.first + self.rows].copy_(weight)


def find_blocks(model: nn.Module) -> Sequence[nn.Module]:
    """The decoder blocks in order; raises FewbitError if the model has no list of modules.

    If the model says which part is its text decoder, only that part is searched, because a vision tower may be larger.
    """
    for part in (_decoder(model), model):
        lists = [list(m) for m in part.modules() if isinstance(m, nn.ModuleList) and len(m)] if part else []
        if lists:
            return max(lists, key=lambda found: sum(_size(module) for module in found))
    raise FewbitError(f"{type(model).__name__}: no list of decoder blocks found in this model")


def _decoder(model: nn.Module) -> nn.Module | None:
    ask = getattr(model, "get_decoder", None)
    found = ask() if callable(ask) else None
    return found if isinstance(found, nn.Module) else None


def _size(module: nn.Module) -> int:
    # A packed layer has buffers instead of a weight.
    return sum(tensor.numel() * tensor.element_size() for tensor in [*module.parameters(), *module.buffers()])


def find_sites(
    blocks: Sequence[nn.Module],
    tensors: list[WeightTensor],
    weights: Weights | None,
    model: nn.Module | None = None,
    names: Mapping[str, Target] | None = None,
    seen: Callable[[Tensor], None] | None = None,
) -> list[list[Site]]:
    """Sites of the quantized tensors of every block; a tensor of fused experts has one site for each expert.

    weights: reads a tensor, to check the values in the network (None: no check, and tensors are found only by name).
    model, names: the whole network and the location of the checkpoint's tensors in it; without them, the names must be
    those in the blocks. seen: called with every parameter that has been read. Tensors outside the blocks have no site.
    Raises FewbitError, with the tensor's name, if it is not found in the network or has other values there.
    """
    finder = _Finder(blocks, weights, model, names)
    found: dict[str, list[tuple[int, Site]]] = {}
    # Experts with equal values are distinguished by their order.
    for tensor in sorted(tensors, key=lambda tensor: _natural(tensor.entry.name)):
        found[tensor.entry.name] = finder.find(tensor)
        if seen is not None:
            for _, site in found[tensor.entry.name]:
                seen(site.watched.weight.detach())
    sites: list[list[Site]] = [[] for _ in blocks]
    for tensor in tensors:
        for index, site in found[tensor.entry.name]:
            sites[index].append(site)
    return sites


def names_by_parameter(
    model: nn.Module, blocks: Sequence[nn.Module], names: Mapping[str, Target]
) -> list[dict[str, str]]:
    """For every block, parameter name -> name in the checkpoint, for tensors that are loaded without conversion."""
    prefixes = _prefixes(model, blocks)
    found: list[dict[str, str]] = [{} for _ in blocks]
    for name, target in names.items():
        for parameter in () if target.converted else target.parameters:
            spot = _inside(parameter, prefixes)
            if spot is not None:
                found[spot[0]][spot[1]] = name
    return found


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]


def _prefixes(model: nn.Module, blocks: Sequence[nn.Module]) -> dict[str, int]:
    numbers = {id(block): index for index, block in enumerate(blocks)}
    return {f"{name}.": numbers[id(module)] for name, module in model.named_modules() if id(module) in numbers}


def _inside(parameter: str, prefixes: Mapping[str, int]) -> tuple[int, str] | None:
    """The block of a parameter and its name in the block; None for a parameter outside the blocks."""
    parts = parameter.split(".")
    for length in range(1, len(parts)):
        prefix = ".".join(parts[:length]) + "."
        if prefix in prefixes:
            return prefixes[prefix], ".".join(parts[length:])
    return None


@dataclass(frozen=True)
class _Held:
    """A parameter of a block."""

    block: int
    path: str
    scope: nn.Module
    module: nn.Module
    name: str

    @property
    def tensor(self) -> Tensor:
        found = getattr(self.module, self.name)
        assert isinstance(found, Tensor)
        return found.detach()


class _Finder:
    """Finds one tensor after another; remembers the rows already found, for experts with equal values."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        weights: Weights | None,
        model: nn.Module | None,
        names: Mapping[str, Target] | None,
    ) -> None:
        self._blocks, self._weights, self._names = blocks, weights, names
        self._prefixes = _prefixes(model, blocks) if model is not None else {}
        self._taken: dict[tuple[int, str], set[tuple[int | None, int]]] = {}

    def find(self, tensor: WeightTensor) -> list[tuple[int, Site]]:
        target = self._names.get(tensor.entry.name) if self._names is not None else None
        if target is None:
            held = self._by_name(tensor)
            converted = False
        else:
            places = [(_inside(name, self._prefixes)) for name in target.parameters]
            held = [self._held(*place) for place in places if place is not None]
            converted = target.converted
        if not held and (tensor.block is None or (target is not None and target.parameters)):
            # Outside the blocks, or in another list of blocks.
            return []
        sites = self._direct(tensor, held[0]) if held and not converted else []
        if not sites and self._weights is not None:
            sites = self._by_content(tensor, held or self._all(tensor), self._weights(tensor))
        if not sites:
            raise FewbitError(
                f"{tensor.entry.name}: not found in the network that transformers builds: keep it with --exclude"
            )
        return sites

    def _held(self, block: int, path: str) -> _Held:
        owner, _, name = path.rpartition(".")
        scope = self._blocks[block].get_submodule(owner.rpartition(".")[0])
        return _Held(block, path, scope, self._blocks[block].get_submodule(owner), name)

    def _by_name(self, tensor: WeightTensor) -> list[_Held]:
        if tensor.block is None or tensor.block >= len(self._blocks):
            return []
        path = name_in_block(tensor.entry.name)
        known = {name for name, _ in self._blocks[tensor.block].named_parameters()}
        return [self._held(tensor.block, path)] if path in known else []

    def _all(self, tensor: WeightTensor) -> list[_Held]:
        """Every parameter of the tensor's block that it could be, if its name leads to none."""
        if tensor.block is None or tensor.block >= len(self._blocks):
            return []
        names = [name for name, p in self._blocks[tensor.block].named_parameters() if p.dim() in (2, 3)]
        return [self._held(tensor.block, name) for name in names]

    def _direct(self, tensor: WeightTensor, held: _Held) -> list[tuple[int, Site]]:
        """Sites of a tensor that has the same form in the network and in the file; empty if the shapes differ."""
        whole = held.tensor
        if tuple(whole.shape) != tuple(tensor.entry.shape):
            return []
        rows = tensor.entry.shape[-1 if tensor.transposed else -2]
        experts = [None] if whole.dim() == 2 else list(range(whole.shape[0]))
        key = tensor.entry.name
        sites = []
        for expert in experts:
            spot = Spot(expert, 0, rows, tensor.transposed)
            sites.append(self._site(tensor, held, spot, key if expert is None else f"{key}[{expert}]"))
        if self._weights is not None:
            wanted = self._weights(tensor)
            for index, site in enumerate(sites):
                if not same(site.read(), wanted[index * rows : (index + 1) * rows]):
                    raise FewbitError(
                        f"{tensor.entry.name}: the network that transformers builds has different values than the "
                        "file: keep it with --exclude"
                    )
        return [(held.block, site) for site in sites]

    def _by_content(self, tensor: WeightTensor, held: Sequence[_Held], wanted: Tensor) -> list[tuple[int, Site]]:
        """Sites of a tensor that is stacked, split or transposed in the network: the rows with equal values."""
        *lead, _, _ = tensor.entry.shape
        step = wanted.shape[0] // (lead[0] if lead else 1)
        number = next((int(p) for p in reversed(name_in_block(tensor.entry.name).split(".")) if p.isdecimal()), None)
        sites: list[tuple[int, Site]] = []
        first = 0
        while first < wanted.shape[0]:
            guess = first // step if lead else number
            rows = wanted[first : first + step - first % step]
            hit = self._one(held, rows, guess)
            if hit is None:
                return []
            one, spot = hit
            self._taken.setdefault((id(one.module), one.name), set()).add((spot.expert, spot.first))
            key = f"{one.block}.{one.path}" + ("" if spot.expert is None else f"[{spot.expert}]")
            sites.append((one.block, self._site(tensor, one, spot, key)))
            first += spot.rows
        return sites

    def _one(self, held: Sequence[_Held], rows: Tensor, guess: int | None) -> tuple[_Held, Spot] | None:
        """The parameter and the location in it that contain `rows`, or as many of the first of them as fit."""
        for one in held:
            spot = find_rows(one.tensor, rows, guess, self._taken.get((id(one.module), one.name), set()))
            if spot is not None:
                return one, spot
        return None

    def _site(self, tensor: WeightTensor, held: _Held, spot: Spot, key: str) -> Site:
        refuse_owner(tensor.entry.name, held.module, spot.transposed if spot.expert is not None else None)
        watched = Watched(key, held.module, held.name, spot.expert, spot.transposed, held.scope)
        return Site(tensor, watched, spot.first, spot.rows, spot.transposed, spot.order)
