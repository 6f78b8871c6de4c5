"""Twelve parts of this repository to write yourself: what is blank, what grades it, and in which order.

    python -m docs.exercises                    write them to exercises/
    python -m docs.exercises check rmsnorm      grade one

A solution is the source itself: `blank.py` cuts it out when the folder is written, and `grade.py` puts the student's
in its place and runs the project's own tests. Nothing is copied, so nothing can drift.

A new exercise is an entry here, small numbers worked out by hand in cases.py, a usual mistake in
tests/test_exercises.py, and its name in a step of docs/learn.md.
"""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Exercise:
    """One blank, or two that belong together."""
    name: str                               # of its file, and for `check`
    title: str
    file: str                               # where the solution is
    blanks: tuple[str, ...]                 # functions, and methods as Class.method
    minutes: int
    teaches: str
    task: str
    hint: str
    paper: str
    tests: tuple[str, ...]                  # node ids of pytest
    needs: str | None = None                # a package without which it cannot be graded

    @property
    def module(self) -> str:
        """nanollm/layers/norm.py → nanollm.layers.norm"""
        return self.file.removesuffix(".py").replace("/", ".")

    def source(self) -> str:
        return (ROOT / self.file).read_text()


EXERCISES = {exercise.name: exercise for exercise in (                # by how hard they were to write
    Exercise(
        "dpo", "DPO", "nanollm/training/preferences.py", ("dpo",), 10,
        "How a preference between two answers becomes a loss, without a reward model.",
        "delta is Δ of the head, (B,). Return the loss of each pair, (B,). `smoothing` is ε: the share of labels "
        "that may be wrong.",
        "F.logsigmoid(x) is log σ(x). log(sigmoid(x)) is the same until x is very negative, where it is −∞.",
        "Rafailov et al. 2023, arXiv 2305.18290, eq. 7",
        ("tests/test_preferences.py::test_dpo_and_its_kin_are_those_of_trl_for_ten_steps[dpo]",
         "tests/test_preferences.py::test_smoothed_labels_are_those_of_the_authors"),
    ),
    Exercise(
        "mask", "Which keys a query may see", "nanollm/layers/mask.py", ("allowed",), 15,
        "A causal mask, a sliding window and packed documents are one comparison of positions.",
        "Return a bool tensor (B, T, S): True where the query at q_pos may read the key at k_pos. The first line of "
        "the head says when. Padding has position −1: it sees padding, and nothing else sees it.",
        "q_pos[:, :, None] and k_pos[:, None, :] broadcast to (B, T, S). Every condition is then one comparison, "
        "and they are joined with &. A window of W holds W keys, the query's own among them.",
        "Vaswani et al. 2017, arXiv 1706.03762, §3.2.3",
        ("tests/test_modules.py::test_allowed_is_the_table_of_its_docstring",
         "tests/test_consistency.py::test_packed_documents_do_not_see_each_other[window]",
         "tests/test_consistency.py::test_ragged_batch[window-True-True]",
         "tests/test_parity.py::test_logits[gemma2-9b-48]"),
    ),
    Exercise(
        "rmsnorm", "RMSNorm", "nanollm/layers/norm.py", ("rms_norm",), 25,
        "Why a vector's length is all that a decoder normalises, and why the order of roundings matters in bfloat16.",
        "Divide each vector (the last dimension of x) by the root of its mean square, then multiply by the gain. "
        "The statistics are float32. `offset` is added to the gain, in float32, where it is not 0. `cast_after_gain` "
        "says whether x̂ is rounded to the dtype of x before the gain (False), or the product of x̂ in float32 and the "
        "gain in float32 after it (True): the two rows at the end of the head. The result is to equal that of "
        "transformers bit for bit, so multiply by torch.rsqrt(…): x / torch.sqrt(…) means the same, and rounds "
        "otherwise.",
        "x.float() first. ε stands inside the root. The mean itself is not subtracted: that is LayerNorm. Whatever "
        "the order, the result has the dtype of x.",
        "Zhang & Sennrich 2019, arXiv 1910.07467, eq. 4",
        ("tests/test_modules.py::test_rms_norm_is_bit_equal",
         "tests/test_modules.py::test_the_two_cast_orders_differ_in_bfloat16_only",
         "tests/test_parity.py::test_logits[llama-3-24]"),
    ),
    Exercise(
        "sampling", "Top-k, top-p and min-p", "nanollm/inference/sample.py", ("keep_likely",), 25,
        "How a text generator avoids nonsense without always saying the likeliest thing.",
        "Set to −∞ the logits that the filters drop; leave the others as they are. The three apply in this order, "
        "each to what the one before left: its probabilities are those of the softmax of what is left. None means that "
        "a filter is off. top_k may be larger than V. Top-p keeps the fewest tokens whose probabilities reach p: with "
        "probabilities .5 .25 .25, p = .5 keeps one token, and p = .75 keeps two. At least one stays.",
        "Sort, add up with cumsum, decide, and scatter the decision back to the tokens' places. Likeliest first, a "
        "token goes where those before it, cumsum − probabilities, have reached p already (≥, and not >).",
        "Holtzman et al. 2019, arXiv 1904.09751, §3.1",
        ("tests/test_sampling.py::test_filters_keep_what_transformers_keeps",
         "tests/test_sampling.py::test_each_does_what_transformers_does",
         "tests/test_sampling.py::test_all_together_in_the_order_of_generate"),
    ),
    Exercise(
        "rule", "A rule that loads and saves", "checkpoints/names/ops.py", ("Groups.pieces",), 25,
        "How one description of an arrangement serves both ways, so that import and export cannot disagree.",
        "A file holds q, k and v in one matrix, a key/value head at a time: the queries that read it, its key, its "
        "value. Yield (0, view) for each run of rows, in the order of the file. ours is [q, k, v]; each must be a "
        "view, since loading writes into it.",
        "unflatten(0, (K, −1)) cuts the rows of q, k and v into K groups without a copy. layer.mixer.kv_heads is K. "
        "zip the three, and yield what each group holds.",
        "the head of this file; InternLM2 stores its weights so",
        ("tests/test_table.py::test_pieces_are_views",
         *(f"tests/test_table.py::test_ops_are_inverses[{seed}-groups]" for seed in (0, 1, 2)),
         "tests/test_roundtrip.py::test_every_fixture_comes_back_byte_for_byte[internlm2-7b]",
         "tests/test_parity.py::test_logits[internlm2-7b-24]"),
    ),
    Exercise(
        "scan", "The selective scan", "nanollm/layers/scan.py", ("step", "selective_scan"), 30,
        "What stands in the place of attention in Mamba: a state of fixed size, which each token chooses to keep or "
        "to forget.",
        "step: the first equation of the head, for one token. selective_scan: both equations for T tokens, one "
        "after another. Where begins[b, t] is True a document begins: forget h before this token. Return y (B, T, "
        "I) and the last h.",
        "delta[..., None] * A is (B, I, N). B[:, None] makes room for the channels. y_t is the sum over N of C_t · "
        "h_t, and D x may be added at the end, for all tokens at once. Do not write into h: autograd still needs "
        "it.",
        "Gu & Dao 2023, arXiv 2312.00752, §3.2 and Algorithm 2",
        ("tests/test_consistency.py::test_chunked_scan_is_the_scan_with_its_gradients",
         "tests/test_consistency.py::test_token_by_token[mamba]",
         "tests/test_consistency.py::test_packed_documents_do_not_see_each_other[mamba]",
         "tests/test_parity.py::test_logits[mamba-130m-24]"),
    ),
    Exercise(
        "cache", "Writing to the KV cache", "nanollm/layers/state.py", ("KVCache.extend",), 30,
        "Why the thousandth token costs no more products than the first, and how a window fits in a ring.",
        "Store the new k, v in the slots that slots.index (B, T) names, and return the keys and values that the new "
        "queries need. `slots` says which case it is: slots.fresh (the cache was empty: the new ones alone, also those "
        "that the ring has no room for), slots.join (a chunk on a ring: the old ones, self.k[:, :, :slots.old], and "
        "behind them the new ones), else what is stored, up to slots.used. Rows may write to different slots; where "
        "slots.alike is True all rows write to the same, slots.index[0], which is an invitation and no demand.",
        "Take what slots.join needs before you write: the chunk overwrites keys that its own first queries still "
        "see. scatter_ along dimension 2 writes each row's own slots; index[:, None, :, None] has to be expanded to "
        "k's shape. k and v may be of different widths.",
        "Shazeer 2019, arXiv 1911.02150, §2.4",
        ("tests/test_consistency.py::test_token_by_token[window]",
         "tests/test_consistency.py::test_chunks[window-cuts0]",
         "tests/test_consistency.py::test_chunks[window-cuts2]",
         "tests/test_consistency.py::test_ragged_batch[window-False-True]",
         "tests/test_consistency.py::test_token_by_token[latent]",
         "tests/test_consistency.py::test_a_ring_holds_one_window_and_wraps_many_times"),
    ),
    Exercise(
        "lora", "LoRA", "nanollm/training/lora_layer.py", ("LoRALinear.forward", "LoRALinear.merged"), 35,
        "How a large model is tuned by training few numbers beside it, and made one matrix again afterwards.",
        "forward: y = W x + b of the frozen module, and beside it s · B A dropout(x). With `magnitude` (DoRA) it is "
        "y + (stretch − 1) · W dropout(x) + stretch · s · B A dropout(x), where stretch = m / ‖V‖ of each row: without "
        "dropout that is the third line of the head. merged: the one matrix that says the same. self.frozen() is W. "
        "`expert` picks one of stacked experts: self.base(x, expert), A[expert], B[expert].",
        "Drop once, and use what is left in both products; y itself is of the whole x. The side path is computed in "
        "the dtype of A, F.linear(F.linear(x, A), B), and rounded after the sum, .to(y.dtype). ‖V‖ is a constant to "
        "the gradient: detach it, but not m.",
        "Hu et al. 2021, arXiv 2106.09685, §4.1",
        ("tests/test_lora.py::test_a_module_is_pefts",
         "tests/test_lora.py::test_a_model_begins_as_it_was_and_merges_into_what_it_has_become[experts]"),
    ),
    Exercise(
        "rope", "Rotary position embedding", "nanollm/layers/rope.py", ("rotate", "rotation_tables"), 40,
        "How a position becomes an angle, and the two layouts that people mix up.",
        "rotation_tables makes cos and sin for every position and channel; rotate applies them. `frequencies` (f_j) "
        "is given. Both layouts are asked for. The two functions share one convention: sin carries the sign of its "
        "channel, so that rotate is  x·cos + swap(x)·sin.  Where the tables are wider than x the products are, and the "
        "sum is rounded to the dtype of x once. Multiply both tables by attention_factor(rope), which is 1 for a plain "
        "Rope. rotation_tables has all of rope at hand; rotate is told its layout.",
        "With layout 'half' channel j is the partner of j + r/2, so the tables are the angles twice, side by side, "
        "and the first half of sin is negative. With 'interleaved' each angle stands twice in a row, and the even "
        "places of sin are negative. For d = 4 write down both by hand first. Channels past r (the width of the "
        "tables) pass unchanged.",
        "Su et al. 2021, arXiv 2104.09864, eq. 34",
        ("tests/test_rope.py::test_scores_depend_on_the_distance_alone_and_lengths_stay",
         "tests/test_rope.py::test_partial_rotation_counts_its_own_channels",
         "tests/test_modules.py::test_rotation_of_halves_is_bit_equal",
         "tests/test_modules.py::test_rotation_of_neighbours_equals_cohere",
         "tests/test_modules.py::test_partial_interleaved_rotation_equals_glm",
         "tests/test_parity.py::test_logits[llama-3.1-48]"),
    ),
    Exercise(
        "gqa", "Grouped-query attention", "nanollm/layers/attention.py", ("attend_plainly",), 40,
        "The one equation that every decoder is built around, with shared keys, a soft cap and a sink.",
        "q has H heads, k and v have K; head h reads key/value head h // (H/K). In this order: scores, soft cap, "
        "mask, sinks, softmax in float32, and the values mixed. mask is None (all is seen), CAUSAL, a bool tensor "
        "(True: seen), or a float tensor that is added to the scores; a tensor broadcasts to (B, H, T, S). Scores are "
        "in the dtype of q, the softmax is computed in float32, and its result rounded to the dtype of q.",
        "repeat_interleave makes K heads H, and neighbours share. Mask with the least number of the dtype and not "
        "−∞: a row that sees nothing would be NaN. A sink is one more column of scores, whose probability is thrown "
        "away.",
        "Vaswani et al. 2017, arXiv 1706.03762, eq. 1; Ainslie et al. 2023, arXiv 2305.13245",
        ("tests/test_modules.py::test_fused_attention_is_the_definition",
         "tests/test_modules.py::test_soft_cap_equals_gemma2",
         "tests/test_parity.py::test_logits[gpt-oss-20b-24]"),
    ),
    Exercise(
        "router", "The router of a mixture of experts", "nanollm/layers/moe.py", ("route",), 45,
        "How a token chooses its experts, and why the choice and the weight may follow different numbers.",
        "Return the weights g (N, k) in float32 and the experts T (N, k). Scores are computed in float32, whatever the "
        "dtype of the logits. The head has every step in its order: the scores, the correction for the choice, the "
        "groups, the k largest, their weights, renormalised, times config.scale. What the config leaves out is left "
        "out. Where config.sparse is a number (0.01), sparse_route(logits, config.top_k, config.sparse) returns "
        "weights and experts, and is the whole rule.",
        "Experts of groups that are not kept get −∞ in the ranking, since with a correction a score may be below 0. "
        "The ranking is scores + correction; the weights are the scores alone, gathered at the chosen places. Where "
        "config.renormalize is a number and not True, it is added to the sum, and for True something as small as "
        "1e-20.",
        "Jiang et al. 2024, arXiv 2401.04088, §2.1; DeepSeek-AI 2024, arXiv 2412.19437, §2.1.2",
        ("tests/test_modules.py::test_mixtral_experts",
         "tests/test_modules.py::test_qwen_shared_expert_and_raw_weights",
         "tests/test_modules.py::test_sigmoids_that_are_nearly_0_are_divided_by_their_sum_and_a_little",
         "tests/families/test_deepseek.py::test_the_router_of_v3_is_that_of_transformers"),
    ),
    Exercise(
        "softmax", "The online softmax, in Triton", "kernels/attention_tile.py", ("absorb",), 75,
        "How FlashAttention takes a softmax over keys that it never sees all at once.",
        "A tile of queries q has seen some keys: o = Σ p·v, l = Σ p, m = the largest score so far, all relative to "
        "2^m. Take in KEYS more, from `start` on, and return the new o, l, m. Shapes: q and o (QUERIES, BLOCK), l, m, "
        "first, last (QUERIES,), all of o, l, m float32; slope, scale, cap are numbers. BLOCK is the head width padded "
        "to a power of two, at least 16, and WIDTH the head width itself. o and l start as 0, m as −2^127, which is "
        "finite, or −∞ − (−∞) would be NaN. load_rows gets k from k_base and v from v_base, at the rows "
        "start + 0 … KEYS − 1; its `end` is `high`. Scores are q kᵀ · scale, and p = 2^(score − m). Where MASKED a "
        "query sees key j if first ≤ j ≤ last. Where SOFTCAP scores are scale · tanh(cap · q kᵀ). Where ALIBI "
        "slope · (j − last) is added to the score.",
        "m_new = max(m, the largest new score); what was summed before shrinks by exp2(m − m_new). tl.dot wants "
        "input_precision='ieee', and p in the dtype of v. tl.where(seen, s, -float('inf')) masks. Pass MASKED on to "
        "load_rows: keys past `high` are not there. The interpreter lets you print(s) inside.",
        "Milakov & Gimelshein 2018, arXiv 1805.02867, Algorithm 3; Dao 2023, arXiv 2307.08691, §3.1",
        ("tests/kernels/test_attention.py::test_lengths[67-dtype0]",
         "tests/kernels/test_attention.py::test_masks[window 20-dtype1-3.0]",
         "tests/kernels/test_attention.py::test_masks[documents-dtype1-3.0]",
         "tests/kernels/test_attention.py::test_soft_cap_and_alibi[2.0-True-dtype0]"),
        needs="triton",
    ),
)}
