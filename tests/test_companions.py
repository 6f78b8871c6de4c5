"""What is written is complete: ids in config.json and generation_config.json, templates, the tokenizer from wherever it
was found; and what stays behind is said."""

import json

import pytest
import sentencepiece
import transformers

import checkpoints
from checkpoints import companions
from checkpoints.convert import convert, plan
from checkpoints.source import open_source
from nanollm.text import tokenizer
from tests.fixtures import FIXTURES
from tests.meta_folders import write_mistral
from tests.oracles import write
from tests.test_convert import MISTRAL, SHAPE, meta_folder

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def to_hf(source, folder, to="hf"):
    convert(plan(open_source(source, allow_pickle=True), to), folder)
    return folder


def said(folder):
    """As transformers reads both files."""
    config = transformers.AutoConfig.from_pretrained(folder)
    generation = transformers.GenerationConfig.from_pretrained(folder)
    return [[getattr(each, key) for key in IDS] for each in (config, generation)]


def sentencepiece_model(folder):
    """A small tokenizer.model, with BOS 1 and EOS 2 as Llama's."""
    (folder / "text.txt").write_text("\n".join(f"the {a} of {b}" for a in "abcdefgh" for b in "ijklmnop"))
    sentencepiece.SentencePieceTrainer.train(input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"),
                                             vocab_size=40, model_type="bpe", minloglevel=2)
    (folder / "text.txt").unlink()
    (folder / "tokenizer.vocab").unlink()


@pytest.mark.parametrize("where", ["beside", "above"])
def test_meta_to_hugging_face(where, tmp_path):
    """Llama 1 and 2 have one tokenizer.model for the folders of all sizes, one up."""
    meta_folder("llama-1", tmp_path)
    sentencepiece_model(tmp_path / "meta" if where == "beside" else tmp_path)
    model = (tmp_path / "meta" if where == "beside" else tmp_path) / "tokenizer.model"
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(model))
    to_hf(tmp_path / "meta", tmp_path / "out")
    assert said(tmp_path / "out") == [[oracle.bos_id(), oracle.eos_id(), None]] * 2
    assert (tmp_path / "out/tokenizer.model").read_bytes() == model.read_bytes()
    assert tokenizer.load(tmp_path / "out").encode("the a") == [oracle.bos_id(), *oracle.encode("the a")]


def test_ids_beyond_the_vocabulary_are_not_said(tmp_path):
    """A small model with the tokenizer of a large one beside it. And what the layout itself says comes first."""
    sentencepiece_model(tmp_path)
    assert companions.token_ids(tmp_path, "meta", {}, 2) == {"bos_token_id": 1}
    assert companions.token_ids(tmp_path, "gguf", {"eos_token_id": 7, "pad_token_id": None}, 9) == {"eos_token_id": 7}


def test_a_tokenizer_that_cannot_be_read_is_said(tmp_path):
    meta_folder("llama-1", tmp_path)
    (tmp_path / "meta/tokenizer.model").write_bytes(b"no model")
    with pytest.warns(UserWarning, match="tokenizer.model: not read, so the ids of BOS and EOS stay unsaid"):
        to_hf(tmp_path / "meta", tmp_path / "out")


def test_what_hugging_face_says_stays_as_it_is(tmp_path):
    write(FIXTURES["llama-3"], tmp_path / "in")
    (tmp_path / "in/generation_config.json").unlink()
    to_hf(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out/config.json").read_text() and not (tmp_path / "out/generation_config.json").exists()
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads(
        (tmp_path / "in/config.json").read_text())


def test_templates_in_a_folder_of_their_own(tmp_path):
    write(FIXTURES["llama-3"], tmp_path / "in")
    (tmp_path / "in/additional_chat_templates").mkdir()
    (tmp_path / "in/additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")
    for folder, made in (("out", lambda: to_hf(tmp_path / "in", tmp_path / "out")),
                         ("saved", lambda: checkpoints.save(checkpoints.load(tmp_path / "in"), tmp_path / "saved"))):
        made()
        assert (tmp_path / folder / "additional_chat_templates/tool_use.jinja").read_text() == "{{ tools }}"
    (tmp_path / "there").mkdir()
    to_hf(tmp_path / "in", tmp_path / "there")
    assert (tmp_path / "there/additional_chat_templates/tool_use.jinja").exists()


def test_code_stays_behind_and_so_does_the_key_that_names_it(tmp_path):
    write(FIXTURES["llama-3"], tmp_path / "in")
    config = json.loads((tmp_path / "in/config.json").read_text())
    (tmp_path / "in/config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "configuration_x.X"}}))
    about = {"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}
    (tmp_path / "in/tokenizer_config.json").write_text(json.dumps(about))
    for name in ("configuration_x.py", "modeling_x.py", "pytorch_model.bin"):
        (tmp_path / "in" / name).write_text("")
    with pytest.warns(UserWarning) as told:
        to_hf(tmp_path / "in", tmp_path / "out")
    lines = sorted(str(one.message) for one in told)
    assert len(lines) == 2 and "auto_map is left out of config.json, as the .py files" in lines[0]
    assert lines[1].endswith("code (configuration_x.py, modeling_x.py) and other weights or states (pytorch_model.bin)")
    assert json.loads((tmp_path / "out/config.json").read_text()) == config
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text()) == {"tokenizer_class": "X"}
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() > 0


# ---- the length of the context

def test_meta_has_no_key_for_the_context(tmp_path):
    write(FIXTURES["llama-3"], tmp_path / "in")
    config = json.loads((tmp_path / "in/config.json").read_text()) | {"max_position_embeddings": 6000}
    (tmp_path / "in/config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="no key for the context .*: it is 6000 here, and .* take it for 8192"):
        to_hf(tmp_path / "in", tmp_path / "meta", "meta")
    assert open_source(tmp_path / "meta", allow_pickle=True).config.context == 8192
    (tmp_path / "in/config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    to_hf(tmp_path / "in", tmp_path / "right", "meta")


def test_mistral_has_one(tmp_path):
    fixture, params, _ = MISTRAL["v0.1"]
    model = write(fixture, tmp_path / "hf")
    to_hf(tmp_path / "hf", tmp_path / "out", "mistral")
    assert json.loads((tmp_path / "out/params.json").read_text())["max_seq_len"] == 128
    assert open_source(tmp_path / "out").config.context == open_source(tmp_path / "hf").config.context == 128
    to_hf(tmp_path / "out", tmp_path / "back")
    assert json.loads((tmp_path / "back/config.json").read_text())["max_position_embeddings"] == 128
    more = dict(n_kv_heads=2, head_dim=8, hidden_dim=96, norm_eps=1e-2, vocab_size=131)
    write_mistral(model, tmp_path / "silent", SHAPE | more | params)
    assert open_source(tmp_path / "silent").config.context == 32_768
