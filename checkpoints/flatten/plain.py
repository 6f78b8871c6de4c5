"""What every flattened file has behind its model: it loads, generates, and is a command. Copied as it is, but for what
stands between marks, `#? name` … `#.`, which is there where the model has it."""

TEXT = '''
def load(folder: str | Path, dtype: torch.dtype | None = None) -> Decoder:
    """The model with the weights of a Hugging Face folder. dtype None: that of its embedding."""
    stored = {name: tensor for file in Path(folder).glob("*.safetensors") for name, tensor in load_file(file).items()}
    with torch.device("meta"):
        model = Decoder()
#? uniform
    values = {mine.format(i=i): stored[theirs.format(i=i)] for mine, theirs in NAMES.items() for i in range(LAYERS)}
#.
#? no uniform
    ours, values = dict(model.named_parameters()), {}
    for mine, theirs in NAMES.items():
        for i in range(@LAYERS@) if "{i}" in mine else (0,):
            if mine.format(i=i) in ours:
                values[mine.format(i=i)] = stored[theirs.format(i=i)]
#.
#? arranged
    for mine, theirs, arrange in ARRANGED:
#? apart
        for i in range(@LAYERS@) if "{i}" in mine[0] else (0,):
#.
#? no apart
        for i in range(@LAYERS@):
#.
            names = [name.format(i=i) for name in mine]
            if names[0] in ours:
#? experts
                numbers = range(len(ours[names[0]])) if "{e}" in theirs[0] else (0,)
                tensors = [stored[name.format(i=i, e=e)] for name in theirs for e in numbers]
#.
#? no experts
                tensors = [stored[name.format(i=i)] for name in theirs]
#.
                values |= zip(names, arrange(tensors, [ours[name] for name in names]), strict=True)
#.
    dtype = dtype or values["embed.weight"].dtype
#? float32
    kept = {name: value.dtype if name.endswith(FLOAT32) else dtype for name, value in values.items()}
    values = {name: value.to(kept[name]).contiguous() for name, value in values.items()}
#.
#? no float32
    values = {name: value.to(dtype).contiguous() for name, value in values.items()}
#.
#? tied
    model.load_state_dict(values, assign=True, strict=False)
#.
#? no tied
    model.load_state_dict(values, assign=True)
#.
#? tied
    model.head.weight = model.embed.weight
#.
    return model


@torch.inference_mode()
def generate(model: Decoder, prompt: list[int], new_tokens: int, temperature: float = 0.0) -> Iterator[int]:
    """The tokens that follow a prompt, one by one: the likeliest, or drawn at a temperature."""
#? cache
    cache, tokens = Cache(model, 1, len(prompt) + new_tokens), torch.tensor([prompt], device=model.embed.weight.device)
    for _ in range(new_tokens):
        logits = model(tokens, cache)[:, -1].float()
        tokens = torch.multinomial((logits / temperature).softmax(-1), 1) if temperature else logits.argmax(-1, True)
        yield int(tokens)
#.
#? no cache
    ids = list(prompt)
    for _ in range(new_tokens):             # the angles of all tokens follow the length: nothing can be remembered
        logits = model(torch.tensor([ids], device=model.embed.weight.device))[:, -1].float()
        ids.append(int(torch.multinomial((logits / temperature).softmax(-1), 1) if temperature else logits.argmax()))
        yield ids[-1]
#.


if __name__ == "__main__":                  # python FILE FOLDER "a text"
    from tokenizers import Tokenizer
    folder, prompt = Path(sys.argv[1]), sys.argv[2]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    print(tokenizer.decode(list(generate(load(folder), tokenizer.encode(prompt).ids, 32))))
'''


def chosen(text: str, there: set[str], words: dict[str, str]) -> list[str]:
    """The text with the marked parts of what is there, and words in place of @WORD@."""
    out, keep = [], [True]
    for line in text.strip("\n").splitlines():
        if line.startswith("#? "):
            name = line[3:]
            keep.append(keep[-1] and (name[3:] not in there if name.startswith("no ") else name in there))
        elif line == "#.":
            keep.pop()
        elif keep[-1]:
            for word, new in words.items():
                line = line.replace(f"@{word}@", new)
            out.append(line)
    return out
