"""GPTQ's layout, as AutoGPTQ, GPTQModel and AutoRound write it: whole numbers, the matrix turned over.

    w[n, k] = s[g, n] (q[k, n] − z[g, n])        g = g_idx[k], the group of input k

    X.qweight   (K b/32, N) int32    q of b bits, packed down the inputs, the first in the lowest bits
    X.scales    (G, N) float16       s
    X.qzeros    (G, N b/32) int32    z − 1 ("gptq"), or z ("gptq_v2"), packed along the outputs; of
                                     z = 0 the 1 is taken from the word, as GPTQModel does it
    X.g_idx     (K,) int32           k // group_size, or another order, where desc_act sorted the inputs ("act-order");
                                     not there: k // group_size

b and the group are those of the shapes, so layers may have their own (GPTQModel's "dynamic", AutoRound's
"extra_config"). Symmetric weights are those whose z are all 2^(b−1): "sym" says nothing more.

AutoGPTQ writes a bias of zeros where a layer has none; source.py passes such over.

Shapes: N outputs, K inputs, G groups.   Frantar et al. 2022 (arXiv 2210.17323); https://github.com/ModelCloud/GPTQModel
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from checkpoints.names.reader import Reader, brief
from checkpoints.storage.files import Stored
from checkpoints.storage.quantized import awq
from checkpoints.storage.quantized.integers import Integers, Ints
from checkpoints.storage.quantized.parts import FLOATS, Held, Layout, matrix, packed, part, turned, unpacked, whole
from nanollm.errors import CheckpointError

BITS = (2, 3, 4, 8)
# how it was quantised, and by which kernels it runs elsewhere
MADE = frozenset("""
    act_group_aware backend batch_size block_name_to_quantize cache_block_outputs damp_auto_increment damp_percent
    dataset desc_act disable_exllama dynamic exllama_config group_size hyb_act lm_head max_input_length meta
    model_file_base_name model_name_or_path model_seqlen module_name_preceding_first_block
    modules_in_block_to_quantize modules_to_not_convert mse offload_to_disk offload_to_disk_path pad_token_id
    parallel_packing quantizer static_groups sym tokenizer true_sequential use_cuda_fp16 use_exllama version
""".split())
OF_AUTOROUND = frozenset("""
    act_bits act_data_type act_dynamic act_group_size act_sym amp autoround_version backend batch_size
    block_name_to_quantize dataset enable_minmax_tuning enable_norm_bias_tuning enable_quanted_input extra_config
    gradient_accumulate_steps group_size iters low_gpu_mem_usage lr minmax_lr modules_to_not_convert nsamples
    quant_block_list quant_lm_head regex_config scale_dtype seqlen super_bits super_group_size sym
    to_quant_block_names train_bs
""".split())
PACKINGS = {  # AutoRound's names: how zeros are stored
    **dict.fromkeys(("auto_round:auto_gptq", "auto_round:gptq", "auto_round:exllamav2"), 1),
    **dict.fromkeys(("auto_round", "auto_round:gptqmodel"), 0),
}
OF_AWQ = ("auto_round:auto_awq", "auto_round:awq")


@dataclass(frozen=True)
class Gptq(Layout):
    """A folder in this layout."""
    bits: int
    group: int | None                            # None: a row
    plus: int                                    # z is what is stored, and this
    own: bool                                    # layers may have bits and groups of their own
    NAME = "GPTQ"

    def __str__(self) -> str:
        return str(Integers(self.bits, self.group, False))

    def plain(self, stored: Mapping[str, Stored], where: str) -> dict[str, Stored]:
        plain = dict(stored)
        for name in stored:
            if name.endswith(".qweight"):
                module = name.removesuffix(".qweight")
                for one in ("qweight", "qzeros", "scales", "g_idx"):
                    plain.pop(f"{module}.{one}", None)
                plain[f"{module}.weight"] = self._weight(module, stored, where)
        return plain

    def _weight(self, module: str, stored: Mapping[str, Stored], where: str) -> Ints:
        codes = matrix(stored, f"{module}.qweight", (torch.int32,), where)
        scales = matrix(stored, f"{module}.scales", FLOATS, where)
        zeros = matrix(stored, f"{module}.qzeros", (torch.int32,), where)
        G, N = scales.shape
        bits = zeros.shape[1] * 32 // max(N, 1)
        K = codes.shape[0] * 32 // max(bits, 1)
        shapes = f"qweight {codes.shape}, scales {scales.shape}, qzeros {zeros.shape}"
        if codes.shape[1] != N or zeros.shape != (G, N * bits // 32) or bits not in BITS or not G or K % 32:
            raise CheckpointError(f"{where}: {module} has {shapes}; expected (K b/32, N), (G, N), (G, N b/32) of b "
                                  f"bits, {', '.join(map(str, BITS))}")
        group = self.group or K
        if (bits, -(-K // group)) != (self.bits, G):
            if not self.own or -(-K // group) != G and K % G:
                raise CheckpointError(f"{where}: {module} has {shapes}: {bits} bits in {G} groups; config.json says "
                                      f"{self}")
            group = group if -(-K // group) == G else K // G
        order = part(stored, f"{module}.g_idx", (torch.int32,), where, (K,)) if f"{module}.g_idx" in stored else None
        how = Integers(bits, None if G == 1 else group, False)
        found = Zeros(zeros.file, torch.int8 if bits < 8 else torch.int16, (N, G), zeros.start, zeros.size, zeros, bits,
                      self.plus)
        return packed(Ints, (N, K), turned(codes), turned(scales), found, how, order)


@dataclass(frozen=True)
class Zeros(Held):
    """z (N, G), of words (G, N b/32)."""
    bits: int
    plus: int

    def make(self) -> Tensor:
        words = whole(self.of)
        if 32 % self.bits:
            z = unpacked(words, self.bits) + self.plus & (1 << self.bits) - 1
        else:                                    # z = 0 took 1 from its neighbour, so that it is added to whole words
            z = unpacked(words + self.plus * sum(1 << at for at in range(0, 32, self.bits)), self.bits)
        return z.to(self.dtype).T.contiguous()


def read(r: Reader) -> Gptq:
    """What a quantization_config says."""
    r.must("checkpoint_format", "gptq", "gptq_v2")
    r.must("format", "gptq", "gptq_v2", None)
    r.must("is_marlin_format", False, None)
    r.must("pack_dtype", "int32", None)
    for key in ("rotation", "adapter"):
        r.must(key, None)
    v2 = "gptq_v2" in (r.get("checkpoint_format", None), r.get("format", None))
    found = Gptq(*_sizes(r), plus=0 if v2 else 1, own=bool(r.get("dynamic", None)))
    r.close(MADE)
    return found


def read_autoround(r: Reader) -> "Gptq | awq.Awq":
    """The same of AutoRound's, which packs as GPTQ or as AWQ does."""
    r.must("data_type", "int")
    r.must("act_bits", 16, 32, None)
    for key in ("rotation_config", "rotation_configs", "transform_config"):
        r.must(key, None, {}, [])
    packing = r.get("packing_format", None) or r.get("backend", None) or "auto_round:auto_gptq"
    if packing in OF_AWQ:
        r.must("bits", 4)
        group = r.get("group_size", 128)
        r.close(OF_AUTOROUND)
        return awq.Awq(None if group == -1 else r.size("group_size", 128))
    if not isinstance(packing, str) or packing not in PACKINGS:
        raise r.error("packing_format", f"{', '.join(map(brief, (*PACKINGS, *OF_AWQ)))}, which are read")
    own = bool(r.get("extra_config", None) or r.get("regex_config", None))
    found = Gptq(*_sizes(r), plus=PACKINGS[packing], own=own)
    r.close(OF_AUTOROUND)
    return found


def _sizes(r: Reader) -> tuple[int, int | None]:
    """Bits, and the inputs of a group."""
    r.get("bits")
    return r.must("bits", *BITS), None if r.get("group_size", 128) == -1 else r.size("group_size", 128)
