"""Adapters in peft's layout: adapter_config.json and adapter_model.safetensors, in and out.

    described.py    adapter_config.json: what is understood, what is passed over, what is refused
    rows.py         which rows of a stored weight are which rows of ours, from the family's table of names
    reading.py      a folder → an Adapter: A, B, m of our weights, and tensors that replace ours
    writing.py      a model with adapters → a folder

peft calls the parts of an adapter after the modules of transformers, and these after the tensors of the checkpoint:

    stored                                      model.layers.0.self_attn.q_proj.weight
    adapter      base_model.model. before it    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight     A
                                                … .lora_B.weight   B        … .lora_magnitude_vector   m of DoRA
    experts      of a 3-dimensional parameter   base_model.model.model.layers.0.mlp.experts.lora_A.weight     (E r, K)
                                                … .lora_B.weight  (N, r E), the expert last;   where two parameters of a
                                                module have adapters, the first one's are under experts.base_layer
    embedding                                   … .lora_embedding_A  (r, V),   … .lora_embedding_B  (D, r)
    whole                                       a tensor without any of these replaces that of the base:
                                                modules_to_save, and biases where `bias` is not "none"

A weight that is several of ours, qkv_proj, has one A for all of them: here they share that parameter, so training goes
on as peft's would. Each has its own rows of B and m.
"""
