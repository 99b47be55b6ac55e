"""Columns in another order than in the layer, as GPTQ has them if it rounds in the order of importance (act-order).

Groups are then consecutive columns again.
"""

from typing import Any

import torch
from torch import Tensor

from fewbit.grids.scheme import Layout
from fewbit.transforms.transform import Parts, Transform, Values

_PART = "transform_order"


def _inputs(x: Tensor, values: Values) -> Tensor:
    return x.index_select(-1, values["order"])


def _back(weight: Tensor, values: Values) -> Tensor:
    return weight.index_select(-1, values["order"].argsort())


def _curvature(curvature: Tensor, values: Values) -> Tensor:
    return curvature.index_select(0, values["order"]).index_select(1, values["order"])


def _layout(columns: int) -> Layout:
    return {_PART: (torch.int32, (columns,))}


def _read(parts: Parts) -> Values:
    return {"order": parts[_PART]}


def _store(values: Values) -> dict[str, Any]:
    return {_PART: values["order"]}


def _problem(values: Values) -> str | None:
    order = values["order"].cpu()
    is_order = torch.equal(order.sort().values, torch.arange(order.numel(), dtype=order.dtype))
    return None if is_order else "the order of the columns does not have every column once"


COLUMN_ORDER = Transform(
    "column-order",
    "columns in the order of another tool's groups (act-order); only in imported folders",
    weight=_inputs,
    back=_back,
    curvature=_curvature,
    inputs=_inputs,
    store=_store,
    layout=_layout,
    read=_read,
    problem=_problem,
    is_chosen=False,
)
