"""Where tensors are in a network: by transformers' mapping, checked number by number; and how they are seen there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fewbit
from fewbit.architecture.content import find_rows
from fewbit.architecture.coverage import cover
from fewbit.architecture.names import names_in_network
from fewbit.architecture.network import Site, find_blocks, find_sites
from fewbit.architecture.orientation import from_matrix, to_matrix
from fewbit.architecture.owners import refuse_owner
from fewbit.checkpoints.safetensors_io import FileReader
from fewbit.checkpoints.source import Checkpoint, open_checkpoint
from fewbit.curvature.observe import Watched, replacing, watching
from fewbit.errors import FewbitError


def sites_of(model: Any, checkpoint: Checkpoint) -> list[list[Site]]:
    tensors = cover(checkpoint.entries.values(), checkpoint.config).of("quantize")
    with FileReader() as reader:
        read: Callable[..., Tensor] = lambda t: to_matrix(reader.tensor(t.entry), t.transposed)  # noqa: E731
        names = names_in_network(model, checkpoint.entries)
        return find_sites(list(find_blocks(model)), tensors, read, model, names)


def change(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
    return folder


def mixtral(folder: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "vocab_size": 128, "num_local_experts": 3, "num_experts_per_tok": 2}
    config = AutoConfig.for_model("mixtral", **sizes, **more)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_every_site_holds_its_tensor_and_no_two_are_one(tmp_path: Path) -> None:
    folder = mixtral(tmp_path / "model")

    def alike(tensors: dict[str, Tensor]) -> None:
        # As after upcycling a dense model: every expert is the same, and one's gate is its up projection.
        for name in [n for n in tensors if ".experts." in n]:
            tensors[name] = tensors[name.replace(".experts.1.", ".experts.0.").replace(".experts.2.", ".experts.0.")]
        tensors["model.layers.0.block_sparse_moe.experts.0.w3.weight"] = tensors[
            "model.layers.0.block_sparse_moe.experts.0.w1.weight"
        ]

    checkpoint = open_checkpoint(change(folder, alike))
    model = fewbit.load(folder, device="cpu")
    sites = sites_of(model, checkpoint)
    spots = set()
    with FileReader() as reader:
        for site in (site for block in sites for site in block):
            assert torch.equal(site.read(), reader.tensor(site.tensor.entry))
            spots.add((id(site.watched.module), site.watched.parameter, site.watched.expert, site.first))
            if ".experts." in site.tensor.entry.name:
                number = int(site.tensor.entry.name.split(".experts.")[1].split(".")[0])
                assert site.watched.expert == number
                assert site.first == (48 if ".w3." in site.tensor.entry.name else 0)
    assert len(spots) == sum(map(len, sites)) == 2 * (4 + 9)


def test_a_network_that_holds_other_numbers_is_refused(tmp_path: Path) -> None:
    folder = build_tiny(tmp_path / "model", shard_size="1GB")
    checkpoint = open_checkpoint(folder)
    model = fewbit.load(folder, device="cpu")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5, 7] += 1
    with pytest.raises(FewbitError, match=r"layers\.1\.mlp\.up_proj\.weight: the network .* has different values"):
        sites_of(model, checkpoint)


def test_nan_is_what_it_is_in_the_file(tmp_path: Path) -> None:
    folder = build_tiny(tmp_path / "model", shard_size="1GB")
    change(folder, lambda t: t["model.layers.1.mlp.up_proj.weight"].fill_(float("nan")))
    assert len(sites_of(fewbit.load(folder, device="cpu"), open_checkpoint(folder))) == 2


def test_a_tensor_that_the_network_lacks_is_named(tmp_path: Path) -> None:
    folder = build_tiny(tmp_path / "model", shard_size="1GB")

    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.extra_proj.weight"] = torch.randn(64, 64).bfloat16()

    model = fewbit.load(folder, device="cpu")
    with pytest.raises(FewbitError, match=r"layers\.1\.mlp\.extra_proj\.weight: not found .*--exclude"):
        sites_of(model, open_checkpoint(change(folder, add)))


@pytest.mark.parametrize("module", [nn.Embedding(8, 8), nn.Conv1d(8, 8, 3), type("TopKRouter", (nn.Module,), {})()])
def test_owners_that_are_no_linear_layer(module: nn.Module) -> None:
    with pytest.raises(FewbitError, match=r"^w: in the network this is the weight of a .*--exclude"):
        refuse_owner("w", module, None)


def test_experts_that_were_read_the_wrong_way_round_are_refused() -> None:
    module = nn.Module()
    module.is_transposed = True  # type: ignore[assignment]
    refuse_owner("w", module, True)
    refuse_owner("w", module, None)
    with pytest.raises(FewbitError, match=r"its shape in the network is \(experts, in, out\)"):
        refuse_owner("w", module, False)


@pytest.mark.parametrize("shape", [(6, 4), (3, 6, 4), (2, 3, 6, 4)])
@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_come_back_as_the_tensors_they_were(shape: tuple[int, ...], transposed: bool) -> None:
    whole = torch.randn(shape)
    matrix = to_matrix(whole, transposed)
    assert matrix.shape[1] == (6 if transposed else 4)
    assert torch.equal(from_matrix(matrix, shape, transposed), whole)


def test_rows_are_found_turned_interleaved_and_split() -> None:
    stack, wanted = torch.randn(3, 8, 5), torch.randn(4, 5)
    assert find_rows(stack, wanted, None, ()) is None
    stack[1, 4:] = wanted
    spot = find_rows(stack, wanted, 2, ())
    assert spot is not None and (spot.expert, spot.first, spot.rows, spot.transposed) == (1, 4, 4, False)
    assert find_rows(stack, wanted, None, {(1, 4)}) is None
    turned = find_rows(torch.stack([stack[0].t(), wanted.repeat(2, 1).t()]), wanted, None, {(1, 0)})
    assert turned is not None and (turned.expert, turned.first, turned.transposed) == (1, 4, True)
    mixed = find_rows(wanted[[0, 2, 1, 3]], wanted, None, ())
    assert mixed is not None and mixed.order is not None and mixed.order.tolist() == [0, 2, 1, 3]
    part = find_rows(wanted[:2], wanted, None, ())
    assert part is not None and (part.first, part.rows) == (0, 2)


def test_a_site_whose_rows_are_in_another_order_reads_and_writes_them() -> None:
    tensor = cover(open_entries(), {}).tensors[0]
    layer = nn.Linear(5, 4, bias=False)
    order = torch.tensor([2, 0, 3, 1])
    site = Site(tensor, Watched("k", layer, "weight"), 0, 4, False, order)
    assert torch.equal(site.read(), layer.weight[order])
    new = torch.randn(4, 5)
    site.write(new)
    assert torch.equal(layer.weight[order], new)


def open_entries() -> list[Any]:
    from fewbit.checkpoints.safetensors_io import TensorEntry

    return [TensorEntry("model.layers.0.a.weight", Path("x"), torch.float32, (4, 5), 0, 80)]


class Product(nn.Module):
    """One of the ways in which models multiply by a weight."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        shape = {"x @ W": (6, 4), "bmm": (3, 6, 4), "bmm of W^T": (3, 4, 6)}.get(kind, (4, 6))
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        ways: dict[str, Callable[[], Tensor]] = {
            "linear": lambda: nn.functional.linear(x, weight),
            "x @ W": lambda: x @ weight,
            "x @ W^T": lambda: x @ weight.T,
            "W @ x": lambda: (weight @ x.transpose(-1, -2)).transpose(-1, -2),
            "mm": lambda: torch.mm(x.reshape(-1, 6), weight.t()).view(*x.shape[:-1], 4),
            "bmm": lambda: torch.bmm(x, weight),
            "bmm of W^T": lambda: torch.bmm(x, weight.transpose(1, 2)),
        }
        return ways[self.kind]()


@pytest.mark.parametrize("kind", ["linear", "x @ W", "x @ W^T", "W @ x", "mm", "bmm", "bmm of W^T"])
@pytest.mark.parametrize("backward", [False, True])
def test_every_way_of_multiplying_is_seen(kind: str, backward: bool) -> None:
    layer = Product(kind)
    experts = list(range(3)) if layer.weight.dim() == 3 else [None]
    turned = kind in ("x @ W", "bmm")
    watched = [Watched(f"k{expert}", layer, "weight", expert, turned) for expert in experts]
    x = torch.randn(3, 5, 6, requires_grad=True)
    expected = layer(x)
    expected.square().sum().backward()
    wanted, x.grad = x.grad, None
    seen: dict[str, tuple[Tensor, Tensor | None]] = {}
    with watching(watched, lambda key, inputs, gradient: seen.update({key: (inputs, gradient)}), backward=backward):
        out = layer(x)
        out.square().sum().backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(x.grad, wanted)
    assert set(seen) == {f"k{expert}" for expert in experts}
    for expert in experts:
        inputs, gradient = seen[f"k{expert}"]
        assert torch.equal(inputs, x.reshape(-1, 6) if expert is None else x[expert])
        assert (gradient is not None) == backward
    with replacing(watched, lambda key, inputs, weight, bias: 2 * nn.functional.linear(inputs, weight, bias)):
        torch.testing.assert_close(layer(x), 2 * expected)


@pytest.mark.parametrize("kind", ["linear", "x @ W"])
def test_a_weight_that_is_used_by_its_other_side_is_refused(kind: str) -> None:
    layer = Product(kind)
    layer.weight = nn.Parameter(torch.randn(6, 6))
    layer(torch.randn(2, 6))
    with (
        pytest.raises(FewbitError, match=r"^key: the network stores it as \((out, in|in, out)\)"),
        watching([Watched("key", layer, "weight", None, kind == "linear")], lambda *_: None, backward=False),
    ):
        layer(torch.randn(2, 6))


class Outer(nn.Module):
    """Uses the weight of a layer whose own forward is never called, and calls another."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.other = nn.Linear(6, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.other((self.inner.weight @ x.transpose(-1, -2)).transpose(-1, -2))


def test_a_weight_that_is_used_by_the_module_around_it_is_seen_once() -> None:
    outer = Outer()
    layers = [
        Watched("inner", outer.inner, "weight", None, False, outer),
        Watched("other", outer.other, "weight", None, False, outer),
    ]
    seen: list[str] = []
    with watching(layers, lambda key, inputs, gradient: seen.append(key), backward=False):
        outer(torch.randn(2, 3, 6))
    assert seen == ["inner", "other"]


def test_memory_that_is_given_back_keeps_its_numbers(tmp_path: Path) -> None:
    from fewbit.paging import page_out

    folder = build_tiny(tmp_path / "model", shard_size="1GB")
    checkpoint, model = open_checkpoint(folder), fewbit.load(folder, device="cpu")
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen: list[Tensor] = []

    def look(tensor: Tensor) -> None:
        seen.append(tensor)
        page_out(tensor)

    tensors = cover(checkpoint.entries.values(), checkpoint.config).of("quantize")
    find_sites(list(find_blocks(model)), tensors, None, model, names_in_network(model, checkpoint.entries), look)
    page_out(model.model.norm.weight.detach())
    page_out(torch.empty(0))
    assert len(seen) == 14
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
