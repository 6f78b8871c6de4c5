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
    ours, values = dict(model.named_parameters()), {}
    for mine, theirs in NAMES.items():
        for i in range(@LAYERS@) if "{i}" in mine else (0,):
            if mine.format(i=i) in ours:
                values[mine.format(i=i)] = stored[theirs.format(i=i)]
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
        if temperature:
            tokens = torch.multinomial((logits / temperature).softmax(-1), 1)
        else:
            tokens = logits.argmax(-1, keepdim=True)
        yield int(tokens)
#.
#? no cache
    ids = list(prompt)
    for _ in range(new_tokens):             # the angles of all tokens follow the length: nothing can be remembered
        logits = model(torch.tensor([ids], device=weight.device))[:, -1].float()
        drawn = temperature and torch.multinomial((logits / temperature).softmax(-1), 1)
        ids.append(int(drawn if temperature else logits.argmax(-1)))
        yield ids[-1]
#.


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Continue a prompt with the weights of a Hugging Face folder.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompt", help="a text (needs the package tokenizers), or ids of tokens: 1,2,3")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_args()
    model, tokenizer = load(args.folder), None
    if args.prompt.replace(",", "").isdigit():
        ids = [int(one) for one in args.prompt.split(",")]
    else:
        from tokenizers import Tokenizer
        tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
        ids = tokenizer.encode(args.prompt).ids
    answer = list(generate(model, ids, args.new_tokens, args.temperature))
    print(tokenizer.decode(answer) if tokenizer else answer)
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
