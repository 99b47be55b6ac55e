"""A stored weight whose latent weights, scales and offsets can be trained, and which is packed again in the same form.

Latent weights are held in steps of their group's first grid, and scales as multiples of the first ones, so that one
learning rate means the same for every layer, bit-width and model.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from fewbit.formats import native
from fewbit.grids.grid import Fitted, Values
from fewbit.grids.inputs import round_tokens
from fewbit.grids.scales import divisor
from fewbit.grids.scheme import StoredWeight
from fewbit.grids.straight_through import seen_as
from fewbit.grids.table import grid_of
from fewbit.outliers.grids import OUTLIER_GRIDS, at_positions, pack_outliers
from fewbit.solvers.settled import encode, read_codes, read_settled
from fewbit.transforms.table import TRANSFORMS
from fewbit.tuning.choice import TuningChoice

MARGIN = 0.3
"""Of a step: latent weights begin no farther from their level, lest the first noise undoes a solver's work."""
_SMALLEST_GAIN = 0.05


class TunedWeight(nn.Module):
    """One weight `(out, in)`, for inputs that went through its transform.

    latent: `(out, groups, g)`, in steps. gain: what multiplies the first scales. offset: zero-points, or minima in
    steps. outliers: latent outliers in their stored order, in units of their mean magnitude. What a grid lacks is None.
    """

    latent: nn.Parameter | None
    offset: nn.Parameter | None
    outliers: nn.Parameter | None
    step: Tensor
    first: Tensor
    first_offset: Tensor
    codes: Tensor
    lowest: Tensor
    highest: Tensor
    places: Tensor
    outlier_unit: Tensor
    outlier_scale: Tensor
    outlier_minimum: Tensor

    def __init__(
        self, stored: StoredWeight, parts: Mapping[str, Tensor], original: Tensor | None, choice: TuningChoice
    ) -> None:
        """`original`: the 16-bit weight `(out, in)`; latent weights begin there, up to `MARGIN` from their level."""
        super().__init__()
        self.stored, self._choice, self._grid = stored, choice, grid_of(stored.scheme)
        self._parts = {} if choice.trains_weights else dict(parts)
        self._settled = read_settled(parts, stored)
        values, rows = self._settled.core.values, stored.shape[0]
        decoded = native.decode_stored(parts, stored)
        grouped = decoded.view(rows, -1, stored.scheme.group_size)
        step = self._grid.step(values, stored.scheme)
        self._keep(step=divisor(step), first=values["scale"])
        self._fixed = [name for name in values if name not in ("scale", "offset")]
        self._keep(**{f"fixed_{name}": values[name] for name in self._fixed})
        if "offset" in values:
            self._keep(first_offset=values["offset"])
        self._mapped = native.read_transform(parts, stored)
        self._keep(**{f"mapped_{name}": value for name, value in self._mapped.items()})
        self.latent = None
        if choice.trains_weights:
            begin = grouped
            if original is not None:
                kind = TRANSFORMS[stored.scheme.transform]
                near, margin = kind.weight(original.float(), self._mapped).view_as(grouped), MARGIN * step
                begin = torch.maximum(torch.minimum(near, grouped + margin), grouped - margin)
            self.latent = nn.Parameter(begin / self.step)
        else:
            self._keep(codes=read_codes(parts, stored))
        self.gain = nn.Parameter(torch.ones_like(self.first), requires_grad=choice.trains_scales)
        self.offset = None
        if "offset" in values:
            self.offset = nn.Parameter(values["offset"] / self._offset_unit, requires_grad=choice.trains_scales)
        self.outliers = None
        if self._settled.where is not None and self._settled.outliers is not None:
            where = self._settled.where
            found = decoded.view(-1)[where]
            scale, minimum = at_positions(self._settled.outliers.values, where, stored.shape)
            self._keep(places=where, outlier_scale=scale, outlier_minimum=minimum)
            self._keep(outlier_unit=found.abs().mean().clamp(min=1e-12))
            moves = choice.trains_weights and choice.train != "codes"
            self.outliers = nn.Parameter(found / self.outlier_unit, requires_grad=moves)
        if choice.train == "codes":
            low, high = self._grid.neighbours(grouped, values, stored.scheme)
            self._keep(lowest=low / self.step, highest=high / self.step)
        if self.latent is not None:
            self._begin_with(grouped)

    def inputs(self, x: Tensor) -> Tensor:
        """Inputs `(..., in)` as the weight takes them."""
        scheme = self.stored.scheme
        x = TRANSFORMS[scheme.transform].inputs(x, self._map())
        return round_tokens(x, scheme.input_bits) if scheme.input_bits else x

    def plain(self) -> Tensor:
        """The weight `(out, in)` as :meth:`decoded`, for inputs as they are."""
        return TRANSFORMS[self.stored.scheme.transform].back(self.decoded(), self._map())

    def _map(self) -> dict[str, Tensor]:
        return {name: getattr(self, f"mapped_{name}") for name in self._mapped}

    @torch.no_grad()
    def _begin_with(self, grouped: Tensor) -> None:
        """Latent weights that would not round to what is stored begin there: not all levels are evenly spaced."""
        assert self.latent is not None
        astray = (self.decoded().view_as(grouped) - grouped).abs() > 1e-3 * self.step.abs()
        if self._grid.span.weights > 1:
            # What is rounded together goes back together: one weight of it alone could lead elsewhere.
            astray = astray.any(dim=-1, keepdim=True) | astray.any(dim=0, keepdim=True)
        self.latent.copy_(torch.where(astray, grouped / self.step, self.latent))

    def _keep(self, **tensors: Tensor) -> None:
        """Tensors that follow the module to its device and are no part of its state."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def decoded(self) -> Tensor:
        """The weight `(out, in)` float32 as it would be stored now; gradients reach what is trained."""
        scheme, values = self.stored.scheme, self._seen_values()
        latent = self._latent()
        if latent is None:
            value = self._grid.decode(self.codes, values, scheme)
        else:
            value = self._grid.through(latent, values, scheme)
        value = value.reshape(-1)
        if self.outliers is not None:
            value = value.scatter(0, self.places, self._outlier_values())
        return value.view(self.stored.shape)

    def rows(self, chosen: Tensor | slice, given: Mapping[str, Tensor] | None = None) -> "TunedWeight":
        """The same weight with some of its rows only, for one that has separate rows; gradients reach the parameters.

        chosen: ascending indices `(n,)`, or a slice. given: what stands in for those rows of some parameters.
        """
        known = {name: value for name, value in self._parameters.items() if value is not None}
        taken = {name: value[chosen] for name, value in known.items() if given is None or name not in given}
        part = copy.copy(self)
        part._parameters = {**dict.fromkeys(self._parameters), **taken, **(given or {})}  # type: ignore[dict-item]
        part._buffers = {name: None if value is None else value[chosen] for name, value in self._buffers.items()}
        count = part.first.shape[0]
        part.stored = replace(self.stored, shape=(count, self.stored.shape[1]), original_shape=None)
        return part

    @torch.no_grad()
    def parts(self) -> dict[str, Tensor]:
        """The stored form, in the layout it had before: as many bytes, the same places of outliers.

        The module must be on the CPU.
        """
        stored, latent = self.stored, self._latent()
        transform = TRANSFORMS[stored.scheme.transform]
        if latent is None:
            parts = {**self._parts, **self._core().parts}
        else:
            weight = latent.reshape(stored.shape).clone()
            if self.outliers is not None:
                weight.view(-1)[self.places] = self.outliers * self.outlier_unit
            encoded = encode(weight, weight, replace(self._settled, core=self._core()))
            parts = {**encoded.parts, **transform.store(self._map())}
            if encoded.outlier_codes is not None:
                parts.update(pack_outliers(encoded.outlier_codes, self.places, stored))
        native.check_parts(parts, stored)
        return {name: parts[name] for name in native.part_layout(stored)}

    def _latent(self) -> Tensor | None:
        """Latent weights in their own units, or None where codes stay."""
        if self.latent is None:
            return None
        latent: Tensor = self.latent
        if self._choice.train == "codes":
            latent = torch.maximum(torch.minimum(latent, self.highest), self.lowest)
        return latent * self.step

    @property
    def _offset_unit(self) -> Tensor | float:
        return self.step if self._grid.offset == "minimum" else 1.0

    def _wanted(self) -> dict[str, Tensor]:
        """Values of the grid as trained, before they are rounded to be stored."""
        fixed = {name: getattr(self, f"fixed_{name}") for name in self._fixed}
        wanted = {**fixed, "scale": self.first * self.gain.clamp(min=_SMALLEST_GAIN)}
        if self.offset is not None:
            wanted["offset"] = self.offset * self._offset_unit
        return wanted

    def _seen_values(self) -> Values:
        """Values as a reader would see them; gradients reach the trained ones."""
        wanted = self._wanted()
        if not self._choice.trains_scales:
            kept = {"offset": self.first_offset} if self.offset is not None else {}
            return {**wanted, "scale": self.first, **kept}
        with torch.no_grad():
            seen = self._grid.restore(wanted, self.stored.scheme).values
        rounded = self._choice.trains_weights
        values = {**wanted, "scale": seen_as(wanted["scale"], seen["scale"], 1.0 if rounded else self._damping)}
        if "offset" in wanted:
            damped = not rounded or self._grid.offset == "minimum"
            values["offset"] = seen_as(wanted["offset"], seen["offset"], self._damping if damped else 1.0)
        return values

    @property
    def _damping(self) -> float:
        """LSQ's, for gradients that no rounding has damped yet; several scales of a group have none."""
        scheme = self.stored.scheme
        if self.first.shape[-1] > 1:
            return 1.0
        return float((scheme.group_size * (len(scheme.levels) or 2**scheme.whole_bits - 1)) ** -0.5)

    def _core(self) -> Fitted:
        """The grid of the core as it is now; what was not trained keeps its stored bytes."""
        before = self._settled.core
        return self._grid.restore(self._wanted(), self.stored.scheme) if self._choice.trains_scales else before

    def _outlier_values(self) -> Tensor:
        assert self.outliers is not None
        wanted, kind = self.outliers * self.outlier_unit, OUTLIER_GRIDS[self.stored.scheme.outlier_grid]
        with torch.no_grad():
            _, seen = kind.encode(wanted, self.outlier_scale, self.outlier_minimum, self.stored.scheme)
        return seen_as(wanted, seen)
