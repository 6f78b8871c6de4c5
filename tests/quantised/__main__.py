"""What writes the folders: see __init__.py."""

import json
import shutil
import sys

import torch
import transformers
from safetensors.torch import save_file

from tests.quantised import HERE

LLAMA = dict(vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
              num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=1,
              eos_token_id=2, pad_token_id=None)


class Packer:
    """One program: `config` is what it says in config.json, `pack` gives tensors by name and the weight (N, K)."""
    config: dict
    model = transformers.LlamaConfig(**LLAMA)

    def pack(self, name, weight):
        raise NotImplementedError

    def takes(self, name, weight):
        return weight.ndim == 2 and "_proj" in name


def grid(weight, group, bits, low=0):
    """s (N, G) float16, z (N, G) from `low` on: of the values, whatever they are."""
    parts = weight.unflatten(1, (-1, group))
    low_, high = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0)
    scale = ((high - low_) / (2**bits - 1)).half().float()
    return scale, (-low_ / scale).round().clamp(low, 2**bits - 1)


class Gptq(Packer):
    """bits, and those of the mlp; the order of inputs sorted or not; zeros as of v1, or v2."""

    def __init__(self, bits, mlp_bits, ordered, v1, sym=False):
        self.bits, self.mlp_bits, self.ordered, self.v1, self.sym = bits, mlp_bits, ordered, v1, sym
        own = {"+:.*mlp.*": {"bits": mlp_bits}} if mlp_bits != bits else {}
        self.config = {"quantization_config": {
            "bits": bits, "group_size": 32, "desc_act": ordered, "sym": sym, "lm_head": False, "quant_method": "gptq",
            "checkpoint_format": "gptq" if v1 else "gptq_v2", "pack_dtype": "int32",
            "meta": {"quantizer": ["gptqmodel:7.7.0"], "damp_percent": 0.05, "true_sequential": True},
            **({"dynamic": own} if own else {})}}

    def pack(self, name, weight):
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear
        from gptqmodel.quantization import QuantizeConfig
        from gptqmodel.quantization.config import FORMAT
        from gptqmodel.utils.model import (
            convert_gptq_v1_to_v2_format_module,
            convert_gptq_v2_to_v1_format_module,
        )

        bits, (N, K) = self.mlp_bits if "mlp" in name else self.bits, weight.shape
        order = torch.randperm(K) if self.ordered else torch.arange(K)
        scale, zero = grid(weight[:, order], 32, bits)
        if self.sym:
            zero = torch.full_like(zero, 2 ** (bits - 1))
        groups = torch.empty(K, dtype=torch.int32)
        groups[order] = torch.arange(K, dtype=torch.int32) // 32
        rounded = scale[:, groups] * ((weight / scale[:, groups]).round() + zero[:, groups]).clamp(0, 2**bits - 1).sub(
            zero[:, groups])
        linear = torch.nn.Linear(K, N, bias=False)
        linear.weight.data = rounded
        module = TorchLinear(bits=bits, group_size=32, sym=self.sym, desc_act=self.ordered, in_features=K,
                             out_features=N, format=FORMAT.GPTQ_V2)
        module.pack_original(linear, scale, zero, groups)
        if self.v1:
            convert_gptq_v2_to_v1_format_module(module, QuantizeConfig(bits=bits, group_size=32))
        parts = {part: getattr(module, part).clone() for part in ("qweight", "qzeros", "scales", "g_idx")}
        if self.v1:
            convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
        module.scales = module.scales.float()
        module.train()
        found = super(TorchLinear, module).dequantize_weight().T.float()
        assert (found - rounded).abs().max() < 1e-5, (name, (found - rounded).abs().max())
        if self.v1:
            parts["bias"] = torch.zeros(N, dtype=torch.float16)              # as AutoGPTQ writes it
        return {f"{name}.{part}": one.contiguous() for part, one in parts.items()}, found


class AutoRound(Packer):
    config = {"quantization_config": {
        "bits": 4, "group_size": 32, "sym": False, "data_type": "int", "iters": 0, "seqlen": 1024, "autoround_version":
        "0.16.1", "packing_format": "auto_round:auto_gptq", "quant_method": "auto-round"}}

    def pack(self, name, weight):
        from auto_round_extension.torch.qlinear_torch_zp import QuantLinear

        (N, K), (scale, zero) = weight.shape, grid(weight, 32, 4, low=1)
        linear = torch.nn.Linear(K, N, bias=False)
        linear.weight.data = weight
        module = QuantLinear(4, 32, K, N, False)
        module.pack(linear, scale, zero)
        parts = {f"{name}.{part}": getattr(module, part).contiguous().clone()
                 for part in ("qweight", "qzeros", "scales")}
        module.scales = module.scales.float()
        return parts, module(torch.eye(K)).T.float()


class Awq(Packer):
    config = {"quantization_config": {
        "bits": 4, "group_size": 32, "modules_to_not_convert": None, "quant_method": "awq", "version": "gemm",
        "zero_point": True}}

    def pack(self, name, weight):
        from awq.modules.linear.gemm import WQLinear_GEMM
        from awq.utils.packing_utils import dequantize_gemm

        (N, K), (scale, zero) = weight.shape, grid(weight, 32, 4)
        linear = torch.nn.Linear(K, N, bias=False)
        linear.weight.data = scale.repeat_interleave(32, 1) * ((weight / scale.repeat_interleave(32, 1)).round().add(
            zero.repeat_interleave(32, 1)).clamp(0, 15) - zero.repeat_interleave(32, 1))
        module = WQLinear_GEMM.from_linear(linear, 4, 32, scales=scale.T.contiguous(), zeros=zero.T.contiguous())
        found = dequantize_gemm(module.qweight, module.qzeros, module.scales.float(), 4, 32).T.float()
        return {f"{name}.{part}": getattr(module, part).contiguous() for part in ("qweight", "qzeros", "scales")}, found


class ActOrder(Packer):
    """Of compressed-tensors 0.12: later ones follow no g_idx."""
    args = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    config = {"quantization_config": {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "kv_cache_scheme": None, "version": "0.12.2", "config_groups": {"group_0": {
            "targets": ["Linear"], "input_activations": None, "output_activations": None,
            "weights": {**args, "actorder": "group", "dynamic": False, "block_structure": None}}}}}

    def pack(self, name, weight):
        from compressed_tensors.compressors import PackedQuantizationCompressor
        from compressed_tensors.quantization import QuantizationArgs

        order, args = torch.randperm(weight.shape[1]), QuantizationArgs(**self.args)
        groups = (order.argsort() // 32).int()
        scale = weight[:, order].unflatten(1, (-1, 32)).abs().amax(2) / 7
        parts = {"weight_scale": scale, "weight_g_idx": groups, **PackedQuantizationCompressor().compress_weight(
            weight, scale, args, torch.zeros_like(scale, dtype=torch.int8), groups)}
        return ({f"{name}.{part}": one for part, one in parts.items()},
                PackedQuantizationCompressor().decompress_weight(parts, args))


class ModelOptFp8(Packer):
    config = {"quantization_config": {
        "config_groups": {"group_0": {"input_activations": {"dynamic": False, "num_bits": 8, "type": "float"},
                                      "weights": {"dynamic": False, "num_bits": 8, "type": "float"}}},
        "ignore": ["lm_head"], "quant_algo": "FP8", "kv_cache_scheme": "FP8",
        "producer": {"name": "modelopt", "version": "0.47.0"}}}

    def pack(self, name, weight):
        from modelopt.torch.quantization.qtensor import FP8QTensor

        packed, scale = FP8QTensor.quantize(weight)
        one = {"weight": packed._quantized_data, "weight_scale": scale.float().view(()),
               "input_scale": torch.tensor(0.5)}
        return {f"{name}.{part}": tensor for part, tensor in one.items()}, packed.dequantize(torch.float32, scale=scale)


class ModelOptFp4(Packer):
    config = {"quantization_config": {
        "config_groups": {"group_0": {
            "input_activations": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16},
            "weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}, "targets": ["Linear"]}},
        "ignore": ["lm_head"], "quant_algo": "NVFP4",
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "producer": {"name": "modelopt", "version": "0.47.0"}, "quant_method": "modelopt"}}

    def pack(self, name, weight):
        from modelopt.torch.quantization.qtensor import NVFP4QTensor

        packed, scale, double = NVFP4QTensor.quantize(weight, 16)
        one = {"weight": packed._quantized_data, "weight_scale": scale, "weight_scale_2": double.view(()),
               "input_scale": torch.tensor(0.5)}
        found = packed.dequantize(torch.float32, scale=scale, double_scale=double, block_sizes={-1: 16})
        return {f"{name}.{part}": tensor for part, tensor in one.items()}, found


class Mlx(Packer):
    def __init__(self, bits, group, mode="affine", **own):
        self.usual, self.own = {"group_size": group, "bits": bits, "mode": mode}, own
        said = {**self.usual, **{name.replace("__", "."): one for name, one in own.items()}}
        self.config = {"quantization": said, "quantization_config": said}

    def takes(self, name, weight):
        return weight.ndim > 1

    def pack(self, name, weight):
        import mlx.core as mx

        if weight.ndim == 3:                     # of transformers: experts in one tensor, gate and up in one matrix
            halves = {"gate_proj": weight[:, :64], "up_proj": weight[:, 64:]} if "gate_up" in name else {
                "down_proj": weight}
            packed = {end: self.pack(f"{name.rpartition('.experts.')[0]}.switch_mlp.{end}", half.flatten(0, 1))
                      for end, half in halves.items()}
            stored = {key: one.unflatten(0, (len(weight), -1)) for parts, _ in packed.values()
                      for key, one in parts.items()}
            return stored, torch.cat([packed[end][1].unflatten(0, (len(weight), -1)) for end in halves], 1)
        how = {**self.usual, **self.own.get(name.replace(".", "__"), {})}
        parts = mx.quantize(mx.array(weight.half().numpy()), **how)
        affine = how["mode"] == "affine"
        exact = [one.astype(mx.float32) if affine and i else one for i, one in enumerate(parts)]
        found = torch.tensor(mx.dequantize(*exact, **how, dtype=mx.float32).tolist())
        dtypes = torch.uint32, *[torch.float16 if affine else torch.uint8] * 2
        stored = {part: torch.tensor(one.tolist(), dtype=dtype)
                  for part, one, dtype in zip(("weight", "scales", "biases"), parts, dtypes, strict=False)}
        return {f"{name}.{part}": one for part, one in stored.items()}, found


class MlxExperts(Mlx):
    """As mlx-lm names the experts of Qwen3-MoE; the router has 8 bits."""
    model = transformers.Qwen3MoeConfig(**LLAMA | dict(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=32, norm_topk_prob=True))

    def __init__(self):
        super().__init__(4, 32, model__layers__0__mlp__gate={"group_size": 32, "bits": 8},
                         model__layers__0__mlp__switch_mlp__down_proj={"group_size": 64, "bits": 6})


CASES = {
    "gptq": lambda: Gptq(4, 4, ordered=False, v1=True, sym=True),
    "gptq-act-order": lambda: Gptq(4, 4, ordered=True, v1=True),
    "gptq-v2-dynamic": lambda: Gptq(4, 8, ordered=False, v1=False),
    "gptq-3bit": lambda: Gptq(3, 2, ordered=True, v1=True),
    "auto-round": AutoRound, "awq": Awq, "compressed-act-order": ActOrder,
    "modelopt-fp8": ModelOptFp8, "modelopt-nvfp4": ModelOptFp4,
    "mlx": lambda: Mlx(4, 32, model__layers__0__mlp__down_proj={"group_size": 32, "bits": 6},
                       model__layers__0__mlp__up_proj={"group_size": 32, "bits": 8}),
    "mlx-3bit": lambda: Mlx(3, 64, model__layers__0__mlp__down_proj={"group_size": 32, "bits": 2},
                            model__layers__0__mlp__up_proj={"group_size": 64, "bits": 5}),
    "mlx-experts": MlxExperts,
    "mlx-mxfp4": lambda: Mlx(4, 32, "mxfp4"), "mlx-nvfp4": lambda: Mlx(4, 16, "nvfp4"),
}


def write(name):
    torch.manual_seed(0)
    packer, folder = CASES[name](), HERE / name
    model = transformers.AutoModelForCausalLM.from_config(packer.model).eval()
    stored = {}
    with torch.no_grad():
        for key, weight in model.named_parameters():
            weight.normal_(1 if "norm" in key else 0, 0.25)
            weight.copy_(weight.half().float())
            if packer.takes(key, weight):
                parts, found = packer.pack(key.removesuffix(".weight"), weight.detach().clone())
                stored |= parts
                assert 0 < (found - weight).abs().max() < 1, (key, (found - weight).abs().max())
                weight.copy_(found)
            else:
                stored[key] = weight.detach().half()
        tokens = torch.randint(0, 32, (1, 9))
        logits = model(tokens).logits
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    (HERE / "oracles").mkdir(exist_ok=True)
    save_file({"tokens": tokens, "logits": logits}, HERE / f"oracles/{name}.safetensors")
    packer.model.dtype, packer.model.architectures = torch.float16, [type(model).__name__]
    config = packer.model.to_diff_dict() | packer.config
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


if __name__ == "__main__":
    for name in sys.argv[1:] or CASES:
        write(name)
