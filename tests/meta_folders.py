"""Folders in the layouts of Meta and Mistral, written by hand from a model of transformers', and the published
forward pass of both.

Nothing here knows our tables. The names, the cuts and the order of the channels follow the published code:
meta-llama/llama, llama/model.py (ColumnParallelLinear, RowParallelLinear, ParallelEmbedding, apply_rotary_emb,
FeedForward) and mistralai/mistral-inference, transformer.py, moe.py, rope.py.
"""

import json
import math

import torch
from safetensors.torch import save_file

COLUMNS = ("wo", "w2")
ORIGINAL = {
    "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo", "gate_proj": "w1", "up_proj": "w3",
    "down_proj": "w2",
}


def neighbours(weight, heads):
    """Rows of a head from halves (0, 1, … | d/2, …) to neighbours (0, d/2, 1, d/2 + 1, …): where pair j of RoPE
    lies."""
    d = len(weight) // heads
    order = [h * d + half * d // 2 + j for h in range(heads) for j in range(d // 2) for half in (0, 1)]
    return weight[order]


def original_tensors(model):
    """A Llama, Mistral or Mixtral of transformers' under the published names, channels as neighbours."""
    config, found = model.config, {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.clone()
        parts = name.split(".")
        if name == "model.embed_tokens.weight":
            found["tok_embeddings.weight"] = tensor
        elif name == "lm_head.weight":
            found["output.weight"] = tensor
        elif name == "model.norm.weight":
            found["norm.weight"] = tensor
        else:
            layer, part = f"layers.{parts[2]}", parts[-2]
            if part in ("input_layernorm", "post_attention_layernorm"):
                found[f"{layer}.{'attention_norm' if part[0] == 'i' else 'ffn_norm'}.weight"] = tensor
            elif part in ("q_proj", "k_proj"):
                found[f"{layer}.attention.{ORIGINAL[part]}.weight"] = neighbours(
                    tensor, config.num_attention_heads if part[0] == "q" else config.num_key_value_heads
                )
            elif part in ("v_proj", "o_proj"):
                found[f"{layer}.attention.{ORIGINAL[part]}.weight"] = tensor
            elif part in ORIGINAL:
                found[f"{layer}.feed_forward.{ORIGINAL[part]}.weight"] = tensor
            elif name.endswith("gate.weight"):
                found[f"{layer}.feed_forward.gate.weight"] = tensor
            elif name.endswith("experts.gate_up_proj"):
                for e, (gate, up) in enumerate(zip(*tensor.chunk(2, 1), strict=True)):
                    (
                        found[f"{layer}.feed_forward.experts.{e}.w1.weight"],
                        found[f"{layer}.feed_forward.experts.{e}.w3.weight"],
                    ) = gate.clone(), up.clone()
            elif name.endswith("experts.down_proj"):
                for e, down in enumerate(tensor):
                    found[f"{layer}.feed_forward.experts.{e}.w2.weight"] = down.clone()
            else:
                raise AssertionError(name)
    return found


def write_meta(model, folder, params, ranks=1, embedding_by_rows=False):
    """params.json, and a file for each rank."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    tensors = original_tensors(model)
    for rank in range(ranks):
        own = {"rope.freqs": torch.arange(4.0)}
        for name, tensor in tensors.items():
            if tensor.ndim == 1:
                own[name] = tensor
                continue
            by_columns = name.split(".")[-2] in COLUMNS or (name.startswith("tok_") and not embedding_by_rows)
            own[name] = tensor.chunk(ranks, 1 if by_columns else 0)[rank].clone()
        torch.save(own, folder / f"consolidated.{rank:02d}.pth")


def write_mistral(model, folder, params):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    save_file(original_tensors(model), folder / "consolidated.safetensors")


def published_logits(w, x, heads, kv_heads, eps, theta=1e4, head_dim=None, window=None, top_k=0, factor=None):
    """The published forward pass, with complex numbers for RoPE. w tensors by their published names; x (B, T)."""
    B, T = x.shape
    h = w["tok_embeddings.weight"][x]
    d = head_dim or h.shape[-1] // heads
    freqs = 1.0 / (theta ** (torch.arange(0, d, 2)[: d // 2].float() / d))
    if factor:                                           # apply_scaling of llama3/model.py
        scaled = []
        for freq in freqs:
            length = 2 * math.pi / freq
            if length < 8192 / 4:
                scaled.append(freq)
            elif length > 8192 / 1:
                scaled.append(freq / factor)
            else:
                smooth = (8192 / length - 1) / (4 - 1)
                scaled.append((1 - smooth) * freq / factor + smooth * freq)
        freqs = torch.stack(scaled)
    turn = torch.polar(torch.ones(T, d // 2), torch.outer(torch.arange(T), freqs))
    position = torch.arange(T)
    visible = position[:, None] >= position
    if window:
        visible &= position[:, None] - position < window

    def norm(v, gain):
        return v.float() * torch.rsqrt(v.float().pow(2).mean(-1, keepdim=True) + eps) * gain

    def rotary(v):
        pairs = torch.view_as_complex(v.float().reshape(*v.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn[None, :, None]).flatten(3)

    def swiglu(v, prefix):
        return (torch.nn.functional.silu(v @ w[f"{prefix}.w1.weight"].T) * (v @ w[f"{prefix}.w3.weight"].T)) @ w[
            f"{prefix}.w2.weight"
        ].T

    i = 0
    while f"layers.{i}.attention_norm.weight" in w:
        a = norm(h, w[f"layers.{i}.attention_norm.weight"])
        q, k, v = ((a @ w[f"layers.{i}.attention.{part}.weight"].T).view(B, T, -1, d) for part in ("wq", "wk", "wv"))
        q, k = rotary(q), rotary(k)
        k, v = (t.repeat_interleave(heads // kv_heads, 2) for t in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(d)
        mixed = torch.einsum("bhts,bshd->bthd", scores.masked_fill(~visible, -torch.inf).softmax(-1), v)
        h = h + mixed.reshape(B, T, -1) @ w[f"layers.{i}.attention.wo.weight"].T
        f = norm(h, w[f"layers.{i}.ffn_norm.weight"])
        if top_k:
            best, which = (f @ w[f"layers.{i}.feed_forward.gate.weight"].T).topk(top_k)
            share, out = best.softmax(-1), torch.zeros_like(f)
            for b in range(B):
                for t in range(T):
                    for s in range(top_k):
                        out[b, t] += share[b, t, s] * swiglu(
                            f[b, t], f"layers.{i}.feed_forward.experts.{which[b, t, s]}"
                        )
            h = h + out
        else:
            h = h + swiglu(f, f"layers.{i}.feed_forward")
        i += 1
    return norm(h, w["norm.weight"]) @ w["output.weight"].T
