"""Published model_types that are not read, and why: no decoders of text, or decoders whose wiring is another one,
or text models inside folders that are not known.

transformers' own lists say the same: MODEL_FOR_MASKED_LM_MAPPING_NAMES and MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
(tests/test_foreign.py).
"""

ENCODER = ("an encoder, which turns a text into vectors and has no next token; sentence-transformers, or transformers' "
           "AutoModel, runs it")
BOTH = "an encoder with a decoder, which reads one sequence and writes another; transformers runs it"
REPLACED = ("a decoder whose layers go on with what their norm gives, in place of the stream, as none does here; "
            "transformers runs it")
SEES = ("a model that reads pictures or sound beside text, and whose folder is not read here, nor the text model "
        "inside it")
CROSSED = "a decoder that reads pictures by cross attention, as no layer here does; transformers runs it"
BLOCKS = ("a decoder whose attention reads blocks of keys that depend on the head (block-sparse), and whose MLP clips "
          "its gate, as no layer here does; its own repository has the code")
FATRELU = ("a Llama whose activation passes nothing below a threshold (FATReLU), as no feed-forward here has. Its own "
           "repository has the code")
UNCOMPARED = ("a decoder whose code is in its own repository and in no library here, so that nothing could be compared "
              "with it")
STREAMS = "a decoder with several residual streams (hyper-connections), where all have one here"
ELSEWHERE = {
    **dict.fromkeys("""
        albert bert camembert convbert data2vec-text deberta deberta-v2 distilbert electra ernie esm flaubert
        jina_embeddings_v3 longformer mobilebert modernbert mpnet nomic_bert roberta xlm-roberta xlm-roberta-xl
    """.split(), ENCODER),
    **dict.fromkeys("""
        bart blenderbot led longt5 m2m_100 marian mbart mt5 pegasus prophetnet switch_transformers t5 umt5
    """.split(), BOTH),
    "minimax": REPLACED, "minimax_text_01": REPLACED,
    **dict.fromkeys("""
        deepseek_vl_v2 falcon_perception git idefics2 idefics3 internvl internvl_chat janus llava llava_next
        llava_onevision locateanything minicpmv minicpmv4_6 molmo multi_modality paligemma phi3_v
        qwen2_audio qwen3_asr
    """.split(), SEES),
    "mllama": CROSSED,
    "phi3small": BLOCKS, "sparsellama": FATRELU, "step3p7": UNCOMPARED,
    "deepseek_v4": STREAMS, "deepseek_ref": STREAMS,   # before transformers had it, V4 was uploaded so
    "whisper": "a model that writes down speech; transformers runs it",
}
