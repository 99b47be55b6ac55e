"""A stored weight whose latent weights, scales and offsets can be trained, and which is packed again in the same form.

Latent weights are held in steps of their group's first grid, and scales as multiples of the first ones, so that one
learning rate means the same for every layer, bit-width and model.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from fewbit.formats import native
from fewbit.formats.scheme import StoredWeight, part_layout
from fewbit.grids import binary
from fewbit.grids.packing import pack, unpack
from fewbit.grids.scales import divisor, from_pattern, to_pattern
from fewbit.pipeline.encode_weight import Settled, encode_weight, read_settled
from fewbit.pipeline.fit_grid import Grid, encode_outliers, outlier_grid_of
from fewbit.tuning.choice import TuningChoice
from fewbit.tuning.straight_through import round_evenly, round_to_levels, round_to_magnitudes, seen_as

MARGIN = 0.3
"""Of a step: latent weights begin no farther from their level, lest the first noise undoes a solver's work."""
_SMALLEST_GAIN = 0.05


class TunedWeight(nn.Module):
    """One weight `(out, in)`.

    latent: `(out, groups, g)`, in steps. gain: what multiplies the first scales. offset: zero-points, or minima in
    steps. outliers: latent outliers in their stored order, in units of their mean magnitude. What a grid lacks is None.
    """

    step: Tensor
    first: Tensor
    lowest: Tensor
    highest: Tensor
    salient: Tensor
    places: Tensor
    outlier_unit: Tensor
    outlier_scale: Tensor
    outlier_minimum: Tensor

    def __init__(
        self, stored: StoredWeight, parts: Mapping[str, Tensor], original: Tensor | None, choice: TuningChoice
    ) -> None:
        """`original`: the 16-bit weight `(out, in)`; latent weights begin there, up to `MARGIN` from their level."""
        super().__init__()
        self.stored, self._choice = stored, choice
        self._parts = {} if choice.trains_weights else dict(parts)
        decoded = native.decode(parts, stored)
        rows, size = stored.shape[0], stored.scheme.group_size
        grouped = decoded.view(rows, -1, size)
        if stored.scheme.grid == "binary":
            scales = from_pattern(parts["scales"], "float16")
            salient = unpack(parts["salient"], 1, stored.shape[1]).view(1, -1, size).bool()
            self._keep(salient=salient)
            step = scales[..., :2].mean(dim=-1, keepdim=True)
            first, offset = scales, None
            self._settled: Settled | None = None
        else:
            self._settled = read_settled(parts, stored)
            core = self._settled.core
            first, step = core.scale.unsqueeze(2), _step_of(core)
            offset = core.offset.unsqueeze(2) if isinstance(core.offset, Tensor) else None
        self._keep(step=divisor(step), first=first)
        begin = grouped
        if original is not None:
            margin = MARGIN * step
            begin = torch.maximum(torch.minimum(original.float().view_as(grouped), grouped + margin), grouped - margin)
        if not choice.trains_weights:
            begin = self._levels_of_codes(parts)
        latent = begin / self.step if choice.trains_weights else begin
        self.latent = nn.Parameter(latent, requires_grad=choice.trains_weights)
        self.gain = nn.Parameter(torch.ones_like(first), requires_grad=choice.trains_scales)
        self.offset = None
        if offset is not None:
            unit = self.step if stored.scheme.grid == "minimum" else 1.0
            self.offset = nn.Parameter(offset / unit, requires_grad=choice.trains_scales)
        self.outliers = None
        if self._settled is not None and self._settled.where is not None and self._settled.outliers is not None:
            where = self._settled.where
            values = decoded.view(-1)[where]
            scale, minimum = outlier_grid_of(where, stored.shape[1], self._settled.outliers)
            self._keep(places=where, outlier_scale=scale, outlier_minimum=minimum)
            self._keep(outlier_unit=values.abs().mean().clamp(min=1e-12))
            moves = choice.trains_weights and choice.train != "codes"
            self.outliers = nn.Parameter(values / self.outlier_unit, requires_grad=moves)
        if choice.train == "codes":
            low, high = self._neighbours(grouped)
            self._keep(lowest=low / self.step, highest=high / self.step)
        if choice.trains_weights:
            self._begin_with(grouped)

    def _levels_of_codes(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Codes that stay, `(out, groups, g)`: a codebook's levels; for the binary grid a sign times 1, or times 2
        where the second magnitude is meant.
        """
        scheme, (rows, columns) = self.stored.scheme, self.stored.shape
        codes = unpack(parts["codes"], scheme.bits, columns).view(rows, -1, scheme.group_size)
        if scheme.grid == "binary":
            second = unpack(parts["second"], 1, columns).view_as(codes)
            return (1.0 + second) * (1.0 - 2.0 * codes)
        return torch.tensor(scheme.levels)[codes.long()] if scheme.levels else codes.float()

    @torch.no_grad()
    def _begin_with(self, grouped: Tensor) -> None:
        """Latent weights that would not round to what is stored begin there: not all levels are evenly spaced."""
        astray = (self.decoded().view_as(grouped) - grouped).abs() > 1e-3 * self.step.abs()
        self.latent.copy_(torch.where(astray, grouped / self.step, self.latent))

    def _neighbours(self, grouped: Tensor) -> tuple[Tensor, Tensor]:
        """The levels below and above each stored value `(out, groups, g)`, or it where there is none: learned rounding
        keeps between them. Where levels are evenly spaced they are a step away.
        """
        levels = self.stored.scheme.levels
        if self.stored.scheme.grid != "codebook" or levels is None:
            return grouped - self.step.abs(), grouped + self.step.abs()
        known = torch.tensor(levels, device=grouped.device)
        middles = (known[1:] + known[:-1]) / 2
        code = torch.bucketize(grouped / divisor(self.first), middles)
        ends = [known[(code + by).clamp(0, len(levels) - 1)] * self.first for by in (-1, 1)]
        return torch.minimum(*ends), torch.maximum(*ends)

    def _keep(self, **tensors: Tensor) -> None:
        """Tensors that follow the module to its device and are no part of its state."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def decoded(self) -> Tensor:
        """The weight `(out, in)` float32 as it would be stored now; gradients reach what is trained."""
        scheme, latent = self.stored.scheme, self._latent()
        if not self._choice.trains_weights:
            value = self._with_codes(latent)
        elif scheme.grid == "binary":
            small, large = binary.magnitudes_of(self._scales().unsqueeze(2), self.salient)
            return round_to_magnitudes(latent, small.expand_as(latent), large.expand_as(latent)).view(self.stored.shape)
        else:
            value = self._rounded(latent)
        value = value.reshape(-1)
        if self.outliers is not None:
            value = value.scatter(0, self.places, self._outlier_values())
        return value.view(self.stored.shape)

    def _rounded(self, latent: Tensor) -> Tensor:
        scheme, scale, offset = self.stored.scheme, self._scales(), self._offset()
        if scheme.grid == "codebook":
            return round_to_levels(latent, scale, scheme.levels)
        if scheme.grid == "minimum":
            assert isinstance(offset, Tensor)
            return round_evenly(latent - offset, scale, torch.zeros_like(scale), 2**scheme.bits - 1, True) + offset
        zero = offset if isinstance(offset, Tensor) else torch.full_like(scale, offset)
        return round_evenly(latent, scale, zero, 2**scheme.bits - 1, scheme.grid != "real-zero")

    def _with_codes(self, codes: Tensor) -> Tensor:
        """Values of codes that stay, on the grids as they are now."""
        scheme, scale = self.stored.scheme, self._scales()
        if scheme.grid == "binary":
            small, large = binary.magnitudes_of(scale.unsqueeze(2), self.salient)
            return torch.where(codes.abs() > 1.5, large, small) * codes.sign()
        if scheme.grid == "codebook":
            return codes * scale
        offset = self._offset()
        return codes * scale + offset if scheme.grid == "minimum" else (codes - offset) * scale

    @torch.no_grad()
    def parts(self) -> dict[str, Tensor]:
        """The stored form, in the layout it had before: as many bytes, the same places of outliers.

        The module must be on the CPU.
        """
        scheme, stored = self.stored.scheme, self.stored
        latent = self._latent()
        if not self._choice.trains_weights:
            scales = {"scales": to_pattern(self._wanted_scales(), "float16")}
            parts = {**self._parts, **(scales if scheme.grid == "binary" else self._core().parts)}
        elif scheme.grid == "binary":
            pattern = to_pattern(self._wanted_scales(), "float16")
            small, large = binary.magnitudes_of(from_pattern(pattern, "float16").unsqueeze(2), self.salient)
            negative, second, _ = binary.encode(latent, small, large)
            planes = {"codes": pack(negative.view(stored.shape), 1), "second": pack(second.view(stored.shape), 1)}
            parts = {**planes, "salient": pack(self.salient.view(-1).to(torch.uint8), 1), "scales": pattern}
        else:
            assert self._settled is not None
            weight = latent.reshape(stored.shape).clone()
            if self.outliers is not None:
                weight.view(-1)[self.places] = self.outliers * self.outlier_unit
            encoded = encode_weight(weight, replace(self._settled, core=self._core()))
            parts = encoded.parts
            if encoded.outlier_codes is not None:
                parts.update(native.pack_outliers(encoded.outlier_codes, self.places, stored))
        native.check_parts(parts, stored)
        return {name: parts[name] for name in part_layout(stored)}

    def _latent(self) -> Tensor:
        latent: Tensor = self.latent
        if not self._choice.trains_weights:
            return latent
        if self._choice.train == "codes":
            latent = torch.maximum(torch.minimum(latent, self.highest), self.lowest)
        return latent * self.step

    def _wanted_scales(self) -> Tensor:
        return self.first * self.gain.clamp(min=_SMALLEST_GAIN)

    def _scales(self) -> Tensor:
        """Scales as a reader would see them: `(out, groups, 1)`, or `(out, groups, 4)` for the binary grid."""
        wanted = self._wanted_scales()
        if not self._choice.trains_scales:
            return self.first
        with torch.no_grad():
            if self.stored.scheme.grid == "binary":
                seen = from_pattern(to_pattern(wanted, "float16"), "float16")
            else:
                seen = native.pack_scales(wanted.squeeze(2), self.stored.scheme)[1].unsqueeze(2)
        return seen_as(wanted, seen, 1.0 if self._choice.trains_weights else self._damping)

    @property
    def _damping(self) -> float:
        """LSQ's, for gradients that no rounding has damped yet; binary magnitudes have none."""
        scheme = self.stored.scheme
        return (
            1.0 if scheme.grid == "binary" else (scheme.group_size * (len(scheme.levels) or 2**scheme.bits - 1)) ** -0.5
        )

    def _offset(self) -> Tensor | float:
        """Zero-points or minima as a reader would see them, `(out, groups, 1)`, or one number."""
        if self.offset is None:
            return float(2 ** (self.stored.scheme.bits - 1)) if self.stored.scheme.grid == "symmetric" else 0.0
        wanted = self._wanted_offset()
        with torch.no_grad():
            seen = self._pack_offset(wanted.squeeze(2))[1].unsqueeze(2)
        rounded = self._choice.trains_weights and self.stored.scheme.grid != "minimum"
        return seen_as(wanted, seen, 1.0 if rounded else self._damping)

    def _wanted_offset(self) -> Tensor:
        assert self.offset is not None
        return self.offset * self.step if self.stored.scheme.grid == "minimum" else self.offset

    def _pack_offset(self, wanted: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scheme = self.stored.scheme
        if scheme.grid == "real-zero":
            return native.pack_real_zeros(wanted, scheme)
        if scheme.grid == "minimum":
            pattern, seen = native.pack_floats(wanted, scheme)
            return {"minima": pattern}, seen
        seen = wanted.round().clamp(0, 2**scheme.bits - 1)
        return {"zeros": pack(seen.to(torch.uint8), scheme.bits)}, seen

    def _core(self) -> Grid:
        """The grid of the core as it is now; what was not trained keeps its stored bytes."""
        assert self._settled is not None
        before = self._settled.core
        if not self._choice.trains_scales:
            return before
        parts, scale = native.pack_scales(self._wanted_scales().squeeze(2), self.stored.scheme)
        offset: Tensor | float = before.offset
        if self.offset is not None:
            more, offset = self._pack_offset(self._wanted_offset().squeeze(2))
            parts = {**parts, **more}
        return Grid(self.stored.scheme, parts, scale, offset)

    def _outlier_values(self) -> Tensor:
        assert self.outliers is not None
        wanted = self.outliers * self.outlier_unit
        with torch.no_grad():
            _, seen = encode_outliers(wanted, self.outlier_scale, self.outlier_minimum, self.stored.scheme)
        return seen_as(wanted, seen)


def _step_of(core: Grid) -> Tensor:
    """The distance between neighbouring levels, `(out, groups, 1)`; for a codebook the mean of them."""
    scale = core.scale.unsqueeze(2).abs()
    levels = core.scheme.levels
    return scale * ((levels[-1] - levels[0]) / (len(levels) - 1)) if levels else scale
