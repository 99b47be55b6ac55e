"""The input sites of a network: linear layers with the same inputs form one site."""

import re
from dataclasses import dataclass

from fewbit.architecture.coverage import name_in_block
from fewbit.architecture.network import Site
from fewbit.curvature.observe import Watched
from fewbit.pipeline.network import Network

_EXPERT = re.compile(r"experts\.(\d+)\.")


@dataclass(frozen=True)
class InputSite:
    """Layers of one block with the same inputs.

    label: attention or mlp, followed by in (its first layers), out (its last) or inner. key: the layer under which the
    inputs are recorded.
    """

    block: int
    label: str
    key: str
    consumers: tuple[Site, ...]

    @property
    def layers(self) -> str:
        """Names of the layers in the block, joined by `+`; all but the first are shortened to their last part."""
        names = [name_in_block(site.tensor.entry.name).removesuffix(".weight") for site in self.consumers]
        return "+".join([names[0], *[name.rpartition(".")[2] for name in names[1:]]])


def watched_layers(network: Network, blocks: list[int] | None = None) -> list[Watched]:
    """Every linear layer of the blocks (default: all), once."""
    chosen = range(len(network.blocks)) if blocks is None else blocks
    return list({site.watched.key: site.watched for index in chosen for site in network.sites[index]}.values())


def input_sites(network: Network, order: list[str], shared: dict[str, str]) -> list[InputSite]:
    """Sites of a network, block by block in the order of their use.

    order: keys under which inputs were recorded, in the order of recording. shared: layer -> the key with the same
    inputs.
    """
    place = {key: index for index, key in enumerate(order)}
    found: list[InputSite] = []
    for block, sites in enumerate(network.sites):
        groups: dict[str, list[Site]] = {}
        for site in sites:
            owner = shared.get(site.watched.key, site.watched.key)
            if owner in place:
                groups.setdefault(owner, []).append(site)
        keys = sorted(groups, key=place.__getitem__)
        parts = [_part(groups[key][0]) for key in keys]
        for index, key in enumerate(keys):
            label = parts[index][0]
            if parts[index] not in parts[:index]:
                label += " in"
            else:
                label += " inner" if parts[index] in parts[index + 1 :] else " out"
            found.append(InputSite(block, label, key, tuple(groups[key])))
    return found


def _part(site: Site) -> tuple[str, str]:
    """Attention or mlp, and the expert."""
    name = name_in_block(site.tensor.entry.name)
    match = _EXPERT.search(name)
    expert = match[1] if match else "" if site.watched.expert is None else str(site.watched.expert)
    return ("attention" if "att" in name.lower() else "mlp"), expert
