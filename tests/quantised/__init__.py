"""Small folders that other programs packed, and what their own dequantisers make of them.

    python -m tests.quantised NAME …          writes them anew, where the programs are installed; no name: all

A folder is a Llama, or a Qwen3-MoE, of one layer with loud weights, which are packed by the program itself; `tokens`
and `logits` in oracles/ are of transformers' class, in float32, with the weights that the program unpacks.
These programs are not installed with the tests; versions, as they were on 2026-11-30 with torch 2.13 and transformers
5.23:

    gptqmodel 7.7.0      TorchLinear: pack, dequantize_weight; convert_gptq_v2_to_v1_format_module
    auto-round 0.16.1    auto_round_extension's QuantLinear: pack, and forward of the identity
    compressed-tensors 0.12.2   PackedQuantizationCompressor: compress_weight, decompress_weight
    autoawq 0.2.9        WQLinear_GEMM.from_linear, dequantize_gemm
    nvidia-modelopt 0.47.0   FP8QTensor, NVFP4QTensor: quantize, dequantize; names as export_hf_checkpoint has them
    mlx 0.32.4           mx.quantize, mx.dequantize; names as mlx-lm 0.32.2 writes them
"""

from pathlib import Path

HERE = Path(__file__).parent
