"""Why a family is as it is: what its paper, or the paper of a part, gives as the reason, in a sentence, with its number
on arXiv. Where we know of no stated reason there is none here.
"""

REASONS: dict[str, list[tuple[str, str]]] = {
    "mistral": [
        ("A window bounds what a token costs and what the cache holds; stacked layers still pass "
         "information on beyond it.", "2310.06825"),
    ],
    "mixtral": [
        ("More parameters at the cost and latency of few: each token uses two of eight experts.", "2401.04088"),
    ],
    "qwen": [
        ("The biases on q, k and v are for extrapolation to longer texts.", "2309.16609"),
    ],
    "qwen3": [
        ("The norm of q and k replaces Qwen2's biases, for stable training.", "2505.09388"),
    ],
    "qwen3_moe": [
        ("The norm of q and k replaces Qwen2's biases, for stable training.", "2505.09388"),
    ],
    "gemma2": [
        ("Soft caps keep scores and logits within bounds; norms on both sides of a branch stabilise "
         "training.", "2408.00118"),
    ],
    "gemma3_text": [
        ("More layers with a short window keep the cache small at long contexts; the norm of q and k "
         "replaces Gemma 2's soft caps.", "2503.19786"),
    ],
    "gemma4_text": [
        ("Layers that attend to the keys and values of a layer before have no cache of their own.", "2405.12981"),
    ],
    "olmo": [
        ("Norms without parameters were judged the safest, and were the fastest of those tried.", "2402.00838"),
    ],
    "olmo2": [
        ("Norms after the branches, and of q and k, for stable training.", "2501.00656"),
    ],
    "olmoe": [
        ("The norm of q and k is for stability.", "2409.02060"),
    ],
    "flex_olmo": [
        ("Each expert can be trained alone, on data that stay where they are, and joined later.", "2507.07024"),
    ],
    "phi3": [
        ("Llama's block, so that what was written for Llama can be used.", "2404.14219"),
    ],
    "falcon": [
        ("Attention and feed-forward beside each other need less communication between devices; few key/value "
         "heads make inference faster.", "2311.16867"),
    ],
    "gpt_neox": [
        ("Attention and feed-forward beside each other train faster; a quarter of each head is rotated as "
         "a compromise of quality and speed.", "2204.06745"),
    ],
    "bloom": [
        ("ALiBi trained more smoothly and ended better; the norm after the embedding is for stability.", "2211.05100"),
    ],
    "mpt": [
        ("ALiBi is meant to read texts longer than those of training.", "2108.12409"),
    ],
    "mamba": [
        ("Parameters of the scan that depend on the token let it keep or forget along the sequence, in "
         "linear time.", "2312.00752"),
    ],
    "mamba2": [
        ("One decay a head makes the scan a product of matrices, which is several times as fast.", "2405.21060"),
    ],
    "jamba": [
        ("Few attention layers among Mamba's keep the cache small; experts add capacity without more "
         "compute.", "2403.19887"),
    ],
    "zamba": [
        ("One shared attention block gives most of what attention gives, for the parameters of one.", "2405.16712"),
    ],
    "recurrent_gemma": [
        ("A state of fixed size in place of a growing cache: less memory, faster on long texts.", "2404.07839"),
    ],
    "rwkv": [
        ("Trains in parallel as a transformer, and runs as a recurrent network.", "2305.13048"),
    ],
    "deepseek": [
        ("Many small experts specialise further, and shared ones hold what all need.", "2401.06066"),
    ],
    "deepseek_v2": [
        ("One short vector a token in place of keys and values makes the cache small.", "2405.04434"),
    ],
    "deepseek_v3": [
        ("A correction spreads the load of experts without the harm that a balance loss does.", "2412.19437"),
    ],
    "deepseek_v32": [
        ("Each query reads a few chosen keys, so long contexts cost less.", "2512.02556"),
    ],
    "kimi_k2": [
        ("More experts at the same number of active ones lowered the loss; half the heads make long "
         "contexts cheaper.", "2507.20534"),
    ],
    "mimo_v2_flash": [
        ("A window of 128 tokens in five layers of six keeps the cache small.", "2601.02780"),
    ],
    "gpt_oss": [
        ("A learned score in the softmax lets a head attend to nothing.", "2508.10925"),
    ],
    "granite": [
        ("Factors after the maximal update parametrisation let settings of a small model hold for a large "
         "one.", "2203.03466"),
    ],
    "minicpm": [
        ("Factors that let settings of small models hold for larger ones.", "2404.06395"),
    ],
    "yuan": [
        ("The filters bring in that in language near tokens depend on each other.", "2311.15786"),
    ],
    "qwen3_next": [
        ("A gate forgets fast, the delta rule changes precisely: the two complement each other.", "2412.06464"),
        ("A gate on the output adds a non-linearity and does away with attention sinks.", "2505.06708"),
    ],
    "starcoder2": [
        ("Grouped key/value heads for faster inference.", "2305.13245"),
    ],
    "gpt_bigcode": [
        ("One key/value head for fast generation in large batches.", "2305.06161"),
    ],
    "nemotron_h": [
        ("Mamba-2 layers cost the same for each token, however long the text.", "2504.03624"),
    ],
    "nemotron-nas": [
        ("A search under the limits of given hardware chose what each layer keeps.", "2411.19146"),
    ],
    "smollm3": [
        ("Without rotation in every fourth layer long contexts went better, and short ones no worse.", "2501.18795"),
    ],
    "glm4_moe": [
        ("The norm of q and k is for the stability of its scores.", "2508.06471"),
    ],
    "lfm2": [
        ("Short convolutions and few attention layers came out of a search for speed and memory on "
         "devices.", "2511.23404"),
    ],
    "arcee": [
        ("relu² was found by a search for models that train for less.", "2109.08668"),
    ],
    "stripedhyena": [
        ("Long convolutions with gates in place of attention cost less than its square.", "2302.10866"),
    ],
}
