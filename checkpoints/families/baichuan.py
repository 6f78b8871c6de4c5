"""Baichuan and Baichuan 2: Llama with q, k and v in one matrix.

Four models share one model_type; their code differs, and no key says how.

                    hidden_size   position   head         vocab_size   what config.json has
    Baichuan-7B        4096       RoPE       plain          64000      max_position_embeddings
    Baichuan-13B       5120       ALiBi      plain          64000      model_max_length
    Baichuan2-7B       4096       RoPE       unit rows     125696      both of these, and z_loss_weight
    Baichuan2-13B      5120       ALiBi      unit rows     125696      model_max_length, z_loss_weight

Unit rows: each row of the head is brought to length 1 before it is used, so a token's logit does not grow with its row.

Read from that, and refused where two signs contradict each other: RoPE if there is max_position_embeddings, ALiBi if
there is only model_max_length, neither with the width of the other model; unit rows if there is z_loss_weight, which
trained Baichuan 2, or if the vocabulary is Baichuan 2's. A vocabulary that a fine-tuning extended decides nothing.

theta is 10000 and no key says so; neither do other keys of Llama's (a head_dim, key/value heads, a scaling) exist here.
"""

from typing import Any

from checkpoints.families.llama import LLAMA_NAMES, LLAMA_SHAPE
from checkpoints.names.config_rows import Heads
from checkpoints.names.config_table import Draft, Row, part
from checkpoints.names.ops import Blocks
from checkpoints.names.reader import Reader
from checkpoints.names.table import QKV, override, rule
from nanollm.config import Alibi, Rope

WIDTH_OF_ROPE, WIDTH_OF_ALIBI = 4096, 5120
FIRST_VOCAB, SECOND_VOCAB = 64000, 125696

BAICHUAN_NAMES = override(LLAMA_NAMES, rule("model.layers.{i}.self_attn.W_pack", QKV, Blocks))


class Position(Row):
    """RoPE if there is max_position_embeddings, ALiBi if there is only model_max_length; either is the context."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        turns = key in r.values
        draft["context"] = r.size(key if turns else "model_max_length")
        other = WIDTH_OF_ALIBI if turns else WIDTH_OF_ROPE
        if draft["dim"] == other:
            raise r.error(key, f"{'none' if turns else 'one'} where hidden_size is {other}: "
                               "Baichuan with RoPE has this key, with ALiBi it does not")
        draft["mixer.rope" if turns else "mixer.alibi"] = part(Rope if turns else Alibi)

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        values = {"model_max_length": draft["context"]}
        return values if draft["mixer.alibi"] else values | {key: draft["context"]}


class UnitHead(Row):
    """Whether the rows of the head are brought to length 1: if the key is there, or the vocabulary is Baichuan 2's."""

    def read(self, r: Reader, draft: Draft, key: str) -> None:
        vocab, second = draft["vocab"], key in r.values
        if second and vocab == FIRST_VOCAB:
            raise r.error(key, f"none where vocab_size is {FIRST_VOCAB}: Baichuan 2 has this key, the first does not")
        draft["unit_head"] = second or vocab == SECOND_VOCAB

    def write(self, draft: Draft, key: str) -> dict[str, Any]:
        return {key: 0} if draft["unit_head"] else {}


BAICHUAN = LLAMA_SHAPE.but(
    "baichuan", "BaichuanForCausalLM", names=(BAICHUAN_NAMES,), layer={"mixer.rope": None},
    keys={"num_attention_heads": Heads(), "max_position_embeddings": Position(), "z_loss_weight": UnitHead()},
    without=("num_key_value_heads", "head_dim", "rope_parameters"),
    irrelevant=frozenset({"model_max_length", "z_loss_weight"}),
)
FAMILIES = {"baichuan": BAICHUAN}
