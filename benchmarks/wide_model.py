"""Write smollm2-135m with 768 columns in place of 576, so that 256 divides them, as k-quants require.

    python benchmarks/wide_model.py OUT

The gains of the norms are folded into the layers behind them; the residual stream of 576 values is mapped into 768 by
a random isometry, which a norm without gains does not see but for its mean being over more values; three heads of
zeros are added to nine, and one to the three of keys and values. The logits stay the same, which is checked.
Embeddings and head are no longer the same matrix, since the last norm's gain is in the head.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fewbit.checkpoints.locate import locate

Tensors = dict[str, torch.Tensor]
WIDE, HEADS, KEY_HEADS = 768, 12, 4


def wide(
    weights: dict[str, torch.Tensor], config: dict[str, Any], seed: int = 0
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the config of the same function with 768 columns; weights: float64."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    size = hidden // config["num_attention_heads"]
    random = torch.randn(WIDE, WIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    into = torch.linalg.qr(random).Q[:, :hidden]  # (768, 576), orthonormal columns
    # A norm over 768 values has a mean square that is smaller by this factor.
    shrink = (hidden / WIDE) ** 0.5

    def reads(name: str, gain: torch.Tensor) -> torch.Tensor:
        return (weights[name] * gain) @ into.T * shrink

    def padded(rows: torch.Tensor, heads: int) -> torch.Tensor:
        return torch.cat((rows, rows.new_zeros(heads * size - rows.shape[0], rows.shape[1])))

    out = {"model.embed_tokens.weight": weights["model.embed_tokens.weight"] @ into.T}
    ones = torch.ones(WIDE, dtype=torch.float64)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        before, behind = weights[f"{at}input_layernorm.weight"], weights[f"{at}post_attention_layernorm.weight"]
        for name, heads in (("q", HEADS), ("k", KEY_HEADS), ("v", KEY_HEADS)):
            key = f"{at}self_attn.{name}_proj.weight"
            out[key] = padded(reads(key, before), heads)
        key = f"{at}self_attn.o_proj.weight"
        out[key] = padded((into @ weights[key]).T, HEADS).T
        for name in ("gate", "up"):
            out[f"{at}mlp.{name}_proj.weight"] = reads(f"{at}mlp.{name}_proj.weight", behind)
        out[f"{at}mlp.down_proj.weight"] = into @ weights[f"{at}mlp.down_proj.weight"]
        out[f"{at}input_layernorm.weight"] = out[f"{at}post_attention_layernorm.weight"] = ones
    out["lm_head.weight"] = reads("model.embed_tokens.weight", weights["model.norm.weight"])
    out["model.norm.weight"] = ones
    changed = {
        "hidden_size": WIDE,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": size,
        "tie_word_embeddings": False,
        "rms_norm_eps": config["rms_norm_eps"] * hidden / WIDE,
    }
    return out, {**config, **changed}


@torch.no_grad()
def main() -> None:
    """Write the model, and compare its logits with the original's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    source = locate("smollm2-135m")
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64).eval()
    config = json.loads((source / "config.json").read_text())
    made, changed = wide(original.state_dict(), config)
    out.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)
    (out / "config.json").write_text(json.dumps({**changed, "torch_dtype": "float32"}, indent=1))
    stored = {name: value.float().contiguous().clone() for name, value in made.items()}
    save_file(stored, out / "model.safetensors", {"format": "pt"})
    ids = AutoTokenizer.from_pretrained(out)("The capital of France is Paris, and that of Italy", return_tensors="pt")
    expected = original(**ids).logits
    found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64)(**ids).logits
    difference = float((found - expected).abs().max() / expected.std())
    print(f"largest difference of logits by their standard deviation: {difference:.1e}")
    if difference > 1e-4:
        raise SystemExit("the model does not compute the same")


if __name__ == "__main__":
    main()
