"""Makes the checkpoints beside it, and what transformers computes with them; needs transformers (5.24 was used).

python make.py
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

# Of `save_pretrained`: experts in one tensor each for all, and two files with an index.
FUSED: dict[str, Any] = {"save_original_format": False, "max_shard_size": 90_000}

CASES: dict[str, dict[str, Any]] = {
    "plain": {"norm_topk_prob": False, "clip_qkv": None, "tie_word_embeddings": False},
    "clipped": {"norm_topk_prob": True, "clip_qkv": 0.7, "tie_word_embeddings": True},
    # Fewer key-value heads.
    "grouped": {"norm_topk_prob": True, "clip_qkv": 2.5, "tie_word_embeddings": False, "num_key_value_heads": 2},
}

for name, options in CASES.items():
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_experts=6,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        pad_token_id=1,
        eos_token_id=0,
        **options,
    )
    model = OlmoeForCausalLM(config).eval()
    for parameter_name, parameter in model.named_parameters():
        # Far from the initial values, so that an error in any tensor shows.
        scale = 0.3 if "norm" in parameter_name else 0.25
        parameter.data = torch.randn(parameter.shape) * scale + (1 if "norm" in parameter_name else 0)
    folder = Path(__file__).parent / name
    model.save_pretrained(folder, **(FUSED if name == "grouped" else {}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    ids = torch.randint(2, 61, (2, 13))
    with torch.no_grad():
        logits = model(ids).logits
    greedy = model.generate(ids[:1], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=8, do_sample=False)
    np.savez(folder / "expected.npz", input_ids=ids.numpy(), logits=logits.numpy(), greedy=greedy[0, 13:].numpy())
    print(name, json.loads((folder / "config.json").read_text())["model_type"], float(logits.abs().max()))
