"""What every flattened file has behind its model: it loads, generates, and is a command. Copied as it is, but for what
stands between marks, `#? name` … `#.`, which is there where the model has it."""

TEXT = '''
def load(folder: str | Path, dtype: torch.dtype | None = None) -> Decoder:
    """The model with the weights of a Hugging Face folder. dtype None: that of its embedding."""
    stored: dict[str, Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        stored |= load_file(file)
    with torch.device("meta"):
        model = Decoder()
#? uniform
    values: dict[str, Tensor] = {}
    for i in range(LAYERS):
        values |= {mine.format(i=i): stored[theirs.format(i=i)] for mine, theirs in NAMES.items()}
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
        for i in range(@LAYERS@):
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
    for name, value in values.items():
        module, _, leaf = name.rpartition(".")
#? float32
        kept = value.dtype if leaf in FLOAT32 else dtype
        setattr(model.get_submodule(module), leaf, nn.Parameter(value.to(kept).contiguous()))
#.
#? no float32
        setattr(model.get_submodule(module), leaf, nn.Parameter(value.to(dtype).contiguous()))
#.
#? tied
    model.head.weight = model.embed.weight
#.
    return model


@torch.inference_mode()
def generate(model: Decoder, prompt: list[int], new_tokens: int, temperature: float = 0.0) -> Iterator[int]:
    """The tokens that follow a prompt, one by one: the likeliest, or drawn at a temperature."""
    weight = model.embed.weight
#? cache
    cache = Cache(model, 1, len(prompt) + new_tokens, weight.dtype, weight.device)
    tokens = torch.tensor([prompt], device=weight.device)
    for _ in range(new_tokens):
        logits = model(tokens, cache)[:, -1].float()
        tokens = torch.multinomial((logits / temperature).softmax(-1), 1) if temperature else logits.argmax(-1, True)
        yield int(tokens)
#.
#? no cache
    ids = list(prompt)
    for _ in range(new_tokens):             # the angles of all tokens follow the length: nothing can be remembered
        logits = model(torch.tensor([ids], device=weight.device))[:, -1].float()
        ids.append(int(torch.multinomial((logits / temperature).softmax(-1), 1) if temperature else logits.argmax()))
        yield ids[-1]
#.


if __name__ == "__main__":                  # python FILE FOLDER "a text", or ids of tokens: 1,2,3
    folder, prompt = Path(sys.argv[1]), sys.argv[2]
    if prompt.replace(",", "").isdigit():
        print(list(generate(load(folder), [int(one) for one in prompt.split(",")], 32)))
    else:
        from tokenizers import Tokenizer
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
