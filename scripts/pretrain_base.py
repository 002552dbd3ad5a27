"""Pretrain the embedded base: a small Llama with its own byte-level BPE, from public-domain books.

    python scripts/pretrain_base.py --books DIR --stories FILE --work build/base --out src/inlay/assets/base

Three steps, each skipped when its result is already in ``--work``: the tokenizer, the token file, and
the training run, which writes a checkpoint every few minutes and goes on from it when started again.
The optimizer is Muon for the matrices and AdamW for the rest; the rate rises over the first steps, stays,
and falls linearly to zero over the last ``--decay`` of them. Windows are drawn without replacement, so
an epoch reads every token once. The first 80 % of the steps cut each window of 512 in two, because short
attention is cheaper; the rest teach the full context. After each tenth of an epoch the held-out books (every
byte of them) are scored in bits per byte, which is comparable with a compressor: ``bzip2 -9`` needs 2.13,
``xz -9e`` 2.24.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import platform
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 4096
CONTEXT = 512
SHORT_CONTEXT_SHARE = 0.8
END, PAD = "<|endoftext|>", "<|pad|>"
# A plain-text template: the base has never seen role tokens, but it has read dialogue.
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}Assistant:{% generation %} {{ m['content'] }}"
    + END
    + "{% endgeneration %}{{ '\n' }}{% else %}{{ m['role'] | capitalize }}: {{ m['content'] }}{{ '\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def books(archive: Path, *, keep_header: bool) -> Iterator[str]:
    """The texts of one tar of Markdown books; the header up to the ruler names title and author."""
    with tarfile.open(archive, "r:gz") as tar:
        for member in sorted(tar.getmembers(), key=lambda m: m.name):
            handle = tar.extractfile(member)
            if handle is None or not member.name.endswith(".md"):
                continue
            text = handle.read().decode("utf-8")
            yield text if keep_header else text.partition("\n-------\n")[2].strip() + "\n"


def stories(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [story.strip() + "\n" for story in file.read().split(END)[:-1]]


def training_texts(args: argparse.Namespace) -> Iterator[str]:
    for archive in sorted(args.books.glob("train-*.tar.gz")):
        yield from books(archive, keep_header=False)
    yield from stories(args.stories)[:-100]  # the last hundred stories are held out


def make_tokenizer(args: argparse.Namespace) -> PreTrainedTokenizerFast:
    path = args.work / "tokenizer.json"
    if not path.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(training_texts(args), trainer)
        tokenizer.save(str(path), pretty=False)
    tokenizer = Tokenizer.from_file(str(path))
    # Every text of the corpus begins behind an end token, so users' texts do too.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A $B", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        bos_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def encode(texts: Iterator[str], tokenizer: PreTrainedTokenizerFast, path: Path) -> np.ndarray:
    if not path.exists():
        parts = []
        end = tokenizer.eos_token_id
        for text in texts:
            parts.append(
                np.array(
                    [end, *tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids], dtype=np.uint16
                )
            )
        part = path.with_suffix(".part.npy")
        np.save(part, np.concatenate(parts))
        os.replace(part, path)
    return np.load(path, mmap_mode="r")


def make_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rope_theta=10000.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        initializer_range=0.02,
    )
    return LlamaForCausalLM(config)


def token_loss(model: LlamaForCausalLM, tokens: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy of each token from those before it; tokens (batch, time + 1)."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(tokens[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def bits_per_byte(loss, model: LlamaForCausalLM, tokens: np.ndarray, nbytes: int, batch: int) -> float:
    """Held-out bits per byte over windows that do not overlap (each token is scored exactly once)."""
    model.eval()
    windows = (len(tokens) - 1) // CONTEXT
    nats = 0.0
    for start in range(0, windows, batch):
        rows = range(start, min(start + batch, windows))
        block = np.stack([tokens[r * CONTEXT : r * CONTEXT + CONTEXT + 1] for r in rows]).astype(np.int64)
        nats += float(loss(model, torch.from_numpy(block), "sum"))
    rest = tokens[windows * CONTEXT :].astype(np.int64)
    if len(rest) > 1:
        nats += float(token_loss(model, torch.from_numpy(rest)[None], "sum"))
    model.train()
    return nats / math.log(2) / nbytes


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.02, momentum=0.95),
        torch.optim.AdamW(rest, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def rate(step: int, steps: int, warmup: int, decay: float) -> float:
    """Trapezoid: rise, stay, fall to zero."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (decay * steps))


def order(windows: int, epoch: int) -> np.ndarray:
    return np.random.default_rng(1000 + epoch).permutation(windows)


def train(args: argparse.Namespace, data: np.ndarray, held: np.ndarray, held_bytes: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = make_model()
    windows = (len(data) - 1) // CONTEXT
    per_epoch = windows // args.batch
    steps = int(args.epochs * per_epoch)
    every = max(1, per_epoch // 10)
    opts = optimizers(model)
    base_rates = [o.param_groups[0]["lr"] for o in opts]
    checkpoint, log = args.work / "checkpoint.pt", args.work / "curve.jsonl"
    first, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        first, seconds = state["step"], state["seconds"]
    loss_of = torch.compile(token_loss, dynamic=False)
    eval_of = torch.compile(token_loss, dynamic=None)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {steps} steps from {first}, "
        f"{per_epoch} an epoch, {len(data):,} training tokens",
        flush=True,
    )
    model.train()
    began, saved_at, running = time.time(), time.time(), []
    for step in range(first, steps):
        epoch, place = divmod(step, per_epoch)
        rows = order(windows, epoch)[place * args.batch : (place + 1) * args.batch]
        block = np.stack([data[r * CONTEXT : r * CONTEXT + CONTEXT + 1] for r in rows]).astype(np.int64)
        factor = rate(step, steps, args.warmup, args.decay)
        for opt, base in zip(opts, base_rates, strict=True):
            for group in opt.param_groups:
                group["lr"] = base * factor
        if step < SHORT_CONTEXT_SHARE * steps:
            half = CONTEXT // 2
            block = np.concatenate([block[:, : half + 1], block[:, half:]])
        loss = loss_of(model, torch.from_numpy(block))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        running.append(float(loss.detach()))
        spent = seconds + time.time() - began
        if (step + 1) % 20 == 0:
            speed = (step + 1 - first) * args.batch * CONTEXT / (time.time() - began)
            print(
                f"step {step + 1}/{steps} loss {np.mean(running[-20:]):.4f} rate {factor:.3f} "
                f"{speed:,.0f} tokens/s {spent:.0f} s",
                flush=True,
            )
        done = step + 1 == steps
        if (step + 1) % every == 0 or done:
            bpb = bits_per_byte(eval_of, model, held, held_bytes, 16)
            row = {
                "epoch": round((step + 1) / per_epoch, 3),
                "step": step + 1,
                "tokens": (step + 1) * args.batch * CONTEXT,
                "train_loss": float(np.mean(running[-every:])),
                "heldout_bits_per_byte": round(bpb, 4),
                "seconds": round(spent),
            }
            with log.open("a") as out:
                out.write(json.dumps(row) + "\n")
            print(row, flush=True)
        if time.time() - saved_at > 240 or done:
            saved_at = time.time()
            part = checkpoint.with_suffix(".part")
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizers": [o.state_dict() for o in opts],
                    "step": step + 1,
                    "seconds": spent,
                },
                part,
            )
            os.replace(part, checkpoint)
    return model


def export(
    args: argparse.Namespace,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    held: np.ndarray,
    held_bytes: int,
    tokens: int,
) -> None:
    """Write the bfloat16 model, the tokenizer and the facts the card is made of."""
    model = model.to(torch.bfloat16)
    args.out.mkdir(parents=True, exist_ok=True)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    prompt = "The old man opened the door and"
    torch.manual_seed(0)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=80, do_sample=True, temperature=0.8, top_k=50)
    curve = [json.loads(line) for line in (args.work / "curve.jsonl").read_text().splitlines()]
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens_in_corpus": tokens,
        "heldout_bytes": held_bytes,
        "exported_bits_per_byte": round(bits_per_byte(token_loss, model, held, held_bytes, 16), 4),
        "bzip2_9_bits_per_byte": 2.13,
        "curve": curve,
        "note": args.note,
        "settings": {
            k: str(v) if isinstance(v, Path) else v
            for k, v in vars(args).items()
            if k not in ("books", "stories", "work", "out", "note")
        },
        "sample": tokenizer.decode(out[0]),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
    }
    (args.out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    (args.out / "README.md").write_text(card(facts))


def card(facts: dict) -> str:
    """The model card, every figure from `training.json`."""
    last = facts["curve"][-1]
    rows = "\n".join(
        f"| {r['epoch']:.2f} | {r['tokens'] / 1e6:.1f} | {r['train_loss']:.3f} | {r['heldout_bits_per_byte']:.3f} |"
        for r in facts["curve"]
    )
    return f"""# The embedded base

A small Llama-architecture language model that ships with inlay, so that everything can be tried on a machine
without a network: {facts["parameters"]:,} parameters in bfloat16, 6 layers, width 256, 4 heads over 2 key/value
heads, a context of {CONTEXT} tokens, input and output embeddings tied, and a byte-level BPE of
{VOCABULARY:,} entries of its own. It has read English prose. It is no assistant: fine-tune it.

- **Data**: 280 public-domain books (118.5 MB; the repository `mlschmitt/classic-books-markdown` at 9448827)
  and 2,216 stories of TinyStories (CDLA-Sharing-1.0), headers removed.
  Ten books of other authors ({facts["heldout_bytes"]:,} bytes) are held out.
- **Training**: `scripts/pretrain_base.py`, {last["tokens"]:,} of {facts["training_tokens_in_corpus"]:,} tokens
  ({last["epoch"]:.2f} epochs), {facts["hardware"]}, {last["seconds"] / 60:.0f} minutes beside other work;
  Muon for matrices, AdamW for the rest; batches of {facts["settings"]["batch"]} × {CONTEXT} tokens. {facts["note"]}
- **Held out**: {facts["exported_bits_per_byte"]:.3f} bits per byte as exported (windows of {CONTEXT} tokens
  that do not overlap, every byte counted). On the same bytes `bzip2 -9` needs 2.13 and `xz -9e` 2.24.

| epoch | million tokens | training loss, nats a token | held-out bits per byte |
| --- | --- | --- | --- |
{rows}

A sample, at temperature 0.8 from "The old man opened the door and":

> {" ".join(facts["sample"].replace(END, "").split())}

Licence of the weights: CC0-1.0 for what is ours; the books are in the public domain, the stories CDLA-Sharing-1.0.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, required=True, help="folder with train-*.tar.gz and valid.tar.gz")
    parser.add_argument("--stories", type=Path, required=True, help="TinyStories sample, gzip")
    parser.add_argument("--work", type=Path, required=True, help="tokenizer, tokens, checkpoint, curve")
    parser.add_argument("--out", type=Path, required=True, help="where the finished base goes")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=16, help="windows of 512 tokens a step")
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--decay", type=float, default=0.5)
    parser.add_argument("--note", default="", help="a sentence for the card, such as how a run was cut short")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(args)
    data = encode(training_texts(args), tokenizer, args.work / "train.npy")
    held = encode(books(args.books / "valid.tar.gz", keep_header=True), tokenizer, args.work / "held.npy")
    held_bytes = sum(len(t.encode()) for t in books(args.books / "valid.tar.gz", keep_header=True))
    print(f"held-out: {held_bytes:,} bytes, {len(held):,} tokens", flush=True)
    model = train(args, data, held, held_bytes)
    export(args, model, tokenizer, held, held_bytes, len(data))


if __name__ == "__main__":
    main()
