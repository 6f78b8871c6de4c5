"""The arguments of train.py, one function for each group of --help, and the table of their defaults.

A new option is one line here, in the group that it belongs to, and stands where it is read.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nanollm import cli
from nanollm.cli import Parser
from nanollm.data.prepare import FIELD_HELP
from nanollm.data.sft import LONG
from nanollm.presets import PRESETS
from nanollm.text.templates import TEMPLATES
from nanollm.training import growing, low_memory
from nanollm.training.argument_types import above_0, column, rate, share, span, which, whole, whole_or_0
from nanollm.training.distillation import KINDS
from nanollm.training.distributed import DTYPES, RECOMPUTE
from nanollm.training.grpo import NORMALISERS
from nanollm.training.optim import BETAS, NAMES, SCHEDULES
from nanollm.training.preferences import BETA

Add = Callable[..., Any]        # add_argument of a group

# What an option is where it is not given. A run that is resumed keeps what it had.
#                     a toy   a published preset   --init
DEFAULTS: dict[str, tuple] = {
    "optimizer":    ("muon",  "adamw",             "adamw"),
    "lr":           (0.012,   0.0003,              0.00002),
    "weight_decay": (0.0,     0.1,                 0.0),
    "context":      (128,     4096,                2048),       # at most the model's own
    "batch_size":   (16,      256,                 16),
    "micro_batch":  (None,    1,                   1),          # None: all rows of a rank
    "steps":        (350,     None,                None),       # None: one epoch of the data; of --chat three
    "warmup":       (20,      None,                None),       # None: 3 % of the steps
}


# With adapters the rate of Dettmers et al. 2023 (arXiv 2305.14314, table 9) for 7 and 13 B, and of Hu et al. 2021
# (arXiv 2106.09685, table 11). B begins as 0 and the weight moves by s B A only: it takes ten times the weight's rate.
LORA_DEFAULTS: dict[str, float] = {"lr": 0.0002}


# Preferences and rewards move a model little and early; the rates are those of trl for all weights, ten times that for
# adapters.
PREFERENCE_LR = {"full": 0.000001, "adapters": 0.00001}


def kind(options: argparse.Namespace) -> int:
    """The column of DEFAULTS that a run takes."""
    return 2 if options.init else 0 if options.preset.endswith("-toy") or f"{options.preset}-toy" in PRESETS else 1


def default(name: str, none: str = "") -> str:
    """How --help states a row of DEFAULTS, with `none` for a value that is None."""
    values = [none if value is None else f"{value:g}" if isinstance(value, float) else str(value)
              for value in DEFAULTS[name]]
    if values[1] == values[2]:
        return f"default {values[0]}; published presets and --init: {values[1]}"
    return f"default {values[0]}; published presets: {values[1]}; --init: {values[2]}"


# ---- the groups

def model_and_data(add: Add) -> None:
    """What is trained, and on what."""
    add("--preset", default="llama", metavar="NAME",
        help=f"shape of a new model, toy or published (default llama, which is llama-toy): {', '.join(PRESETS)}")
    add("--init", type=Path, metavar="FOLDER",
        help="pretrained model to start from, for fine-tuning: config, weights and tokenizer of a folder, or of "
             "owner/name on the Hugging Face hub")
    add("--data", type=Path, nargs="+", default=[], metavar="PATH",
        help="training text: files, folders of them, or hf:owner/name[:config][:split] of the hub (python -m "
             "nanollm.data --help names the formats); or tokenized shards: folders made by python -m nanollm.data, "
             ".bin files (default: the source of Python's standard library)")
    add("--text-field", metavar="NAME", help=FIELD_HELP)
    add("--mix", type=rate, nargs="+", metavar="W",
        help="mixture weights, one for each --chat and then each --data of shards (default: in proportion to their "
             "size)")
    add("--tokenizer", type=Path, metavar="FOLDER",
        help="tokenizer for --data: a folder with its files (default: a BPE trained on the text, or that of --init)")
    add("--vocab", type=whole, metavar="N",
        help="vocabulary size of the BPE that is trained (default: the preset's); of raw .bin files, the size they "
             "were made with")


def chats(add: Add) -> None:
    """Supervised fine-tuning (SFT)."""
    add("--chat", type=Path, nargs="+", metavar="FILE",
        help="chats for supervised fine-tuning (SFT), loss on the answers only: files of messages, alpaca, sharegpt or "
             "prompt/completion (.jsonl, .json, .csv, .parquet …, also packed), folders of them, data sets of the hub "
             "(hf:owner/name:config:split), or sets of a dataset_info.json as dataset_info.json:NAME; with --data, "
             "text is mixed in")
    add("--dataset-dir", type=Path, metavar="FOLDER",
        help="folder of LLaMA-Factory's dataset_info.json, by whose names --chat is then understood")
    add("--columns", type=column, nargs="+", metavar="NAME=COLUMN",
        help="column mapping: what the keys of a format are called in the files, such as prompt=question "
             "response=answer")
    add("--held-out", type=Path, metavar="FILE",
        help="validation data of its own: a file or folder of chats or of text, or shards; all of --chat and --data is "
             "then trained on (default: 5 %% of the chats or of the text is held out)")
    add("--long", choices=LONG,
        help="chats that are longer than --context: drop them, truncate them to the first turns that fit whole, or "
             "error (default drop)")
    add("--template", metavar="NAME_OR_FILE",
        help=f"chat template for a model that has none: a file (Jinja), a name of its own, "
             f"or one of {', '.join(TEMPLATES)}")


def preferences(add: Add) -> None:
    """Learning from answers that were compared."""
    add("--preference", type=Path, nargs="+", metavar="FILE",
        help="preferences: prompts with a chosen and a rejected answer, or with an answer and a label for --loss kto, "
             "as trl and LLaMA-Factory have them; files and sets as for --chat")
    add("--reward", type=Path, nargs="+", metavar="FILE",
        help="reward model, from prompts with a chosen and a rejected answer: one number for each answer")
    add("--loss", choices=(*BETA,),
        help="loss on preferences: dpo (default), its kin robust, hinge and ipo; orpo and simpo, which need no "
             "reference model; kto, on labels or on pairs taken apart")
    add("--beta", type=rate, metavar="B",
        help=f"strength of the loss: β of dpo, ipo (τ), kto, simpo, λ of orpo (default {BETA['dpo']}; simpo "
             f"{BETA['simpo']:g}); weight of the KL to the model as it was, with --grpo (default 0) and --ppo (0.05)")
    add("--label-smoothing", type=share, metavar="SHARE",
        help="share of preferences that may be the wrong way round, for dpo and robust (default 0)")
    add("--gamma", type=rate, metavar="G", help="margin of simpo that the better answer is to have (default 1)")
    add("--kto-weights", type=rate, nargs=2, metavar=("GOOD", "BAD"),
        help="weights of good and of bad answers in kto (default 1 1)")


def reinforcement(add: Add) -> None:
    """Learning from rewards of what the model answers."""
    add("--grpo", type=Path, nargs="+", metavar="FILE",
        help="GRPO: several answers to each prompt of these files are sampled, rewarded, and learnt by how much each "
             "is better than the others; files and sets as for --chat, all but the prompt being columns")
    add("--ppo", type=Path, nargs="+", metavar="FILE",
        help="PPO: the same with a value head, which says for each token what reward is still to come")
    add("--reward-function", metavar="MODULE:NAME",
        help="function that rewards answers, called as trl calls it: NAME(completions=…, prompts=…, **columns) → a "
             "number for each. This runs your code: MODULE is imported, from the working folder or what is installed")
    add("--reward-model", type=Path, metavar="FOLDER", help="in its place a reward model: a run folder of --reward")
    add("--group", type=whole, metavar="G", help="answers to each prompt (default 8; with --ppo 1)")
    add("--max-new-tokens", type=whole, metavar="N", help="length of an answer at most, in tokens (default 256)")
    add("--temperature", type=above_0, metavar="T", help="temperature at which answers are sampled (default 1)")
    add("--updates", type=whole, metavar="U",
        help="steps that learn from the same samples: μ of GRPO, epochs of PPO (default 1)")
    add("--normaliser", choices=NORMALISERS,
        help="normaliser, what a step of --grpo is a mean over: answers, each a mean of its tokens; dr_grpo: answers "
             "over the most tokens, and advantages not over the deviation; dapo: tokens, ε_high 0.28 (default grpo)")
    add("--epsilon", type=share, metavar="E", help="clipping: how far a ratio of probabilities may fall (default 0.2)")
    add("--epsilon-high", type=rate, metavar="E", help="clipping: how far it may rise (default that of --epsilon)")
    add("--gae-lambda", type=rate, metavar="L", help="λ of the advantages of --ppo (default 0.95)")
    add("--value-weight", type=rate, metavar="W", help="weight of the value loss of --ppo (default 0.1)")


def run_folder(add: Add) -> None:
    """Where the run is kept, and whether one goes on."""
    add("--out", type=Path, metavar="FOLDER",
        help="run folder: checkpoints, log, model (default runs/demo; with --preset runs/NAME, with --init "
             "runs/FOLDER-tuned)")
    add("--resume", action="store_true",
        help="continuation of the run in the run folder, from its newest checkpoint, or from step 0 where there is "
             "none. Repeat the run's command with it; optimizer, learning rate, weight decay, context, batch size, "
             "steps, warm-up and dtype may be left out")
    add("--force", action="store_true",
        help="overwriting of the run in that folder; with --resume: continuation although options differ")
    add("--config", type=Path, metavar="FILE", help="options as a TOML file; those on the command line win")


def optimization(add: Add) -> None:
    """The steps: how many, of what, at which rate."""
    add("--steps", type=whole, metavar="N",
        help=f"optimizer steps ({default('steps', none='one epoch, once through the data; with --chat three epochs')})")
    add("--epochs", type=above_0, metavar="E",
        help="epochs, in place of --steps: how often the run goes through the data; 0.5 is half of it")
    add("--batch-size", type=whole, metavar="B",
        help="rows (sequences) a step, over all ranks and micro-batches: ranks × --micro-batch × "
             f"--gradient-accumulation, of which two are enough ({default('batch_size')})")
    add("--micro-batch", type=whole, metavar="B",
        help="rows in one forward and backward pass of a rank; where a rank has more, it takes several passes a step "
             f"and sums their gradients (gradient accumulation; {default('micro_batch', none='all rows of the rank')})")
    add("--gradient-accumulation", type=whole, metavar="N",
        help="micro-batches a step and rank whose gradients are summed (default: as --batch-size and --micro-batch "
             "say)")
    add("--context", type=whole, metavar="T",
        help=f"context length, tokens a row, at most what the model was made for ({default('context')})")
    add("--lr", type=rate, metavar="RATE",
        help=f"peak learning rate ({default('lr')}; with --preference, --grpo, --ppo {PREFERENCE_LR['full']:g}, with "
             f"adapters {PREFERENCE_LR['adapters']:g})")
    add("--min-lr", type=rate, default=0.0, metavar="RATE",
        help="minimum learning rate: the rate at which the schedule ends, not a share of --lr (default 0)")
    add("--schedule", choices=SCHEDULES, default="linear",
        help="learning-rate schedule after the warm-up: down to --min-lr in a line or half a cosine, or "
             "warmup-stable-decay (default linear)")
    add("--warmup", type=whole_or_0, metavar="N",
        help=f"warm-up steps, in which the learning rate rises to --lr ({default('warmup', none='3 %% of the steps')})")
    add("--decay", type=rate, default=0.2, metavar="SHARE",
        help="decay phase of --schedule wsd, as a share of the steps (default 0.2)")
    add("--optimizer", choices=NAMES,
        help="optimizer: AdamW for all parameters; Muon for the matrices inside the layers and AdamW for the rest; or, "
             f"with less memory, GaLore in place of Muon, BAdam, AdamW in 8 bits ({default('optimizer')})")
    add("--galore-rank", type=whole, metavar="R", help=f"rank of galore (default {low_memory.RANK})")
    add("--galore-scale", type=above_0, metavar="ALPHA", help="factor of galore's updates (default 1; paper: 0.25)")
    add("--switch-every", type=whole, metavar="N",
        help="steps to the next subspace of galore (default 200), or to the next block of badam (default 100)")
    add("--betas", type=share, nargs=2, default=BETAS, metavar=("B1", "B2"),
        help="betas of AdamW: how much of its two averages each step keeps (default 0.9 0.95)")
    add("--weight-decay", type=rate, metavar="RATE", help=f"weight decay, on matrices only ({default('weight_decay')})")
    add("--clip", type=rate, default=1.0, metavar="NORM",
        help="gradient clipping: the largest norm a gradient may have, 0 for any (default 1.0)")
    add("--balance", type=rate, default=0.01, metavar="WEIGHT",
        help="load-balance loss: its weight, where the model has experts (default 0.01)")
    add("--z-loss", type=rate, default=0.0, metavar="WEIGHT",
        help="z-loss: the weight of (log Z)², which keeps logits from drifting (default 0; often 0.0001)")
    add("--dropout", type=share, default=0.0, metavar="P",
        help="dropout probability of the embeddings and of what each layer adds to the residual stream (default 0)")
    add("--attention-dropout", type=share, default=0.0, metavar="P",
        help="dropout probability of attention probabilities (default 0)")
    add("--ema", type=share, metavar="DECAY",
        help="exponential moving average (EMA) of the weights, which is evaluated and exported in place of them; often "
             "0.999 (default: none)")
    add("--seed", type=cli.whole(*cli.SEEDS), default=0, metavar="N",
        help="random seed of weights and of the order of rows (default 0)")
    add("--skip-sigma", type=rate, default=0.0, metavar="K",
        help="threshold of loss spikes: steps whose loss or gradient norm is more than K standard deviations above "
             "the last 128 are skipped (default 0: none; often 6)")
    add("--skip-steps", type=span, nargs="+", default=[], metavar="A:B",
        help="steps to pass over, counted from 0: their rows are read and not learnt from")


def growing_and_freezing(add: Add) -> None:
    """What --init is made into before the first step, and which part of it is trained."""
    add("--freeze", nargs="+", metavar="PART",
        help="parameters that stay as they are: parts of their names between dots, such as embed, mixer or layers.0")
    add("--train-last", type=whole, metavar="N",
        help="training of the last N layers, the final norm and the head only; all else is frozen")
    add("--expand", type=whole, metavar="N",
        help="LLaMA-Pro: N new layers, spread evenly, which change nothing at first; only they are trained")
    add("--expand-all", action="store_true", help="training of all layers after --expand, not of the new ones only")
    add("--grow-vocab", nargs="?", const="mean", choices=growing.ROWS,
        help="rows for the tokens that the tokenizer has and the model lacks: the mean of its rows (default), zero, or "
             "drawn as in a new model")
    add("--grow-from", metavar="TEXT", help="new rows are the mean of the rows of this text's tokens")
    add("--add-tokens", nargs="+", metavar="TOKEN",
        help="special tokens that the tokenizer gets, and the model with it as --grow-vocab says")
    add("--rope-scaling", choices=growing.SCALINGS,
        help="angles of RoPE for a longer context: divided by the factor; by a base that grows with the length; YaRN")
    add("--rope-factor", type=rate, metavar="F", help="factor of --rope-scaling: the new context over the old")
    add("--neftune", type=rate, default=0.0, metavar="ALPHA",
        help="NEFTune: noise on the embeddings in training, of this size (default 0; often 5)")
    add("--shift-attention", type=whole, metavar="G",
        help="LongLoRA: attention inside groups of G tokens in training, shifted by G/2 in half of the heads")


def teaching(add: Add) -> None:
    """Learning from another model."""
    add("--teacher", type=Path, metavar="FOLDER",
        help="distillation: a frozen model with the same tokenizer, whose distribution over the next token is learnt "
             "in the place of the token, on --data or --chat")
    add("--distill", choices=KINDS,
        help="divergence that is made small: forward, KL(teacher ‖ student), or reverse (default forward)")


def adapters(add: Add) -> None:
    """Adapters, which are trained in the place of the weights."""
    add("--lora-rank", type=whole, metavar="R",
        help="rank of LoRA: adapters of this rank are trained beside the weights of --init, which stay as they are "
             "(often 8 to 64); their peak learning rate is 0.0002 unless --lr says another")
    add("--lora-alpha", type=rate, metavar="ALPHA", help="factor of the adapters, divided by the rank (default 2 R)")
    add("--lora-dropout", type=share, metavar="P", help="dropout on what adapters read (default 0)")
    add("--lora-targets", nargs="+", metavar="PART",
        help="weights that get an adapter, by a part of their names: q, ffn, layers.3 (default: all matrices of the "
             "layers)")
    add("--rslora", action="store_true", help="rank-stabilised LoRA: the factor is divided by the root of the rank")
    add("--dora", action="store_true", help="DoRA: length and direction of each row of a weight are tuned apart")
    add("--lora-plus", type=rate, metavar="RATIO",
        help="LoRA+: learning rate of the second factor, B, as a multiple of A's (often 16)")
    add("--lora-init", choices=("zero", "pissa", "loftq"),
        help="first values of the adapters: B = 0; the largest directions of the weight; or those that make up for "
             "what --quantize loses (default zero)")
    add("--quantize", choices=("nf4", "int8", "int4"),
        help="quantisation of the weights beside adapters (QLoRA): NF4 as bitsandbytes has it, or 8 or 4 bits as "
             "generate.py has them")
    add("--adapter", type=Path, metavar="FOLDER",
        help="adapter to go on from, in the place of a new one: a run folder, or a folder of peft's")


def hardware(add: Add) -> None:
    """What computes, and in which dtype."""
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="device: cpu, cuda, cuda:1 …; with --plan the name of a GPU (default: cuda where there is one)")
    add("--dtype", choices=("auto", *DTYPES), default="auto",
        help="dtype of matrix products (mixed precision); weights, gradients and optimizer stay float32 (default auto: "
             "bfloat16 where the device is faster at it)")
    add("--replicas", type=whole, default=1, metavar="R",
        help="replicas of the sharded model (HSDP): R groups of ranks, each with a whole model in shards (default 1)")
    add("--recompute", choices=RECOMPUTE, default="none",
        help="activation checkpointing: activations that the backward pass computes again instead of keeping: none, "
             "all but attention, or all (default none)")
    add("--compile", action="store_true", help="torch.compile for each layer")
    add("--offload", action="store_true",
        help="CPU offload: weights, gradients and optimizer state live in the memory of the CPU")


def evaluation(add: Add) -> None:
    """What is measured and kept on the way."""
    add("--eval-every", type=whole, default=100, metavar="N",
        help="steps between evaluations of the held-out (validation) loss, the first of them at step 0 (default 100)")
    add("--eval-only", action="store_true",
        help="evaluation instead of training: the held-out loss of the model in --init, or with --out of the newest "
             "checkpoint in that run folder, whose options it takes")
    add("--patience", type=whole, metavar="N",
        help="early stopping: the run ends after N evaluations in a row without a new lowest held-out loss, or with "
             "--tasks a new best mean (default: never)")
    add("--tasks", type=lambda text: text.split(","), metavar="NAME,NAME",
        help="tasks of lm-evaluation-harness that are asked on the way; needs lm_eval: pip install -e '.[eval]'")
    add("--evaluate-every", type=whole, default=1000, metavar="N",
        help="steps between evaluations of --tasks, which are asked at the end, too (default 1000)")
    add("--tasks-data", type=Path, metavar="DIR", help="files of --tasks, DIR/TASK/SPLIT.jsonl: docs/evaluation.md")
    add("--tasks-limit", type=whole, metavar="N", help="documents of each of --tasks (default all)")
    add("--sample-every", type=whole_or_0, default=200, metavar="N",
        help="steps between samples of text, 0 for none (default 200)")
    add("--prompt", metavar="TEXT",
        help='prompt that samples continue (default "def " on the standard library, else the beginning of a document)')
    add("--save-every", type=whole, default=200, metavar="N", help="steps between checkpoints (default 200)")
    add("--keep", type=whole, default=2, metavar="N", help="checkpoints that are kept, the newest (default 2)")
    add("--keep-best", action="store_true",
        help="checkpoint with the lowest held-out loss: kept beside the newest, and exported at the end")
    add("--export", type=which, metavar="WHICH",
        help="export instead of training: the checkpoint in the run folder --out that becomes its model: last, best or "
             "a step that is kept")
    add("--tensorboard", action="store_true", help="TensorBoard event files in the run folder, beside log.jsonl")
    add("--wandb", metavar="PROJECT", help="Weights & Biases project that gets the curves, beside log.jsonl")
    add("--mlflow", metavar="EXPERIMENT",
        help="MLflow experiment that gets the curves: in runs/mlruns beside the run folder, or at MLFLOW_TRACKING_URI")


def planning(add: Add) -> None:
    """What a run would take."""
    add("--plan", action="store_true", help="estimate of memory, communication and time of the run, instead of the run")
    add("--world-size", type=whole, default=1, metavar="N", help="number of GPUs (ranks) to plan for (default 1)")
    add("--mfu", type=rate, default=0.4, metavar="SHARE",
        help="model FLOPs utilisation to plan with: the share of the GPU's peak that is reached (default 0.4)")


GROUPS: dict[str, Callable[[Add], None]] = {             # the title in --help, and who adds the group
    "the model and its data": model_and_data,
    "chats": chats,
    "preferences": preferences,
    "reinforcement": reinforcement,
    "the run folder": run_folder,
    "optimization": optimization,
    "growing and freezing a model": growing_and_freezing,
    "distillation": teaching,
    "adapters": adapters,
    "hardware": hardware,
    "evaluation, samples, checkpoints": evaluation,
    "planning": planning,
}


def build_parser(description: str) -> Parser:
    """Every option of train.py, with its default and what it means."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for title, group in GROUPS.items():
        group(parser.add_argument_group(title).add_argument)
    return parser
