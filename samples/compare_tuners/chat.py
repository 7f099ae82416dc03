"""Greedy agreement on chat prompts: how far a quantized model gives the float model's own answer.

The float model answers each of prompts.txt once, greedy, through its chat template.  A quantized model gives the same
answer up to token n just when its most likely token is the float model's at each of the n places before, so one forward
pass over prompt and answer tells how far they agree, without writing:

    n(prompt)  =  number of leading places at which argmax q(· | prompt, answer so far) = answer
    sentence   =  n reaches the end of the answer's first sentence, or of the answer where it has none
    tokens     =  mean of n / length of the answer

Greedy answers part for good at the first difference, however small the loss: this is a harder figure than KL, and with
50 prompts one of few digits (± .07 of the share of sentences).
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from evaluate import Figures, bits_per_weight, block_linears, log_probabilities, put, read
from transformers import AutoTokenizer

from roundexport.model.checkpoint import Checkpoint

PROMPTS = Path(__file__).with_name("prompts.txt")
LENGTH = 48  # tokens of an answer at most
_END = re.compile(r"(?<!\d)[.!?](?=\s|$)|\n")  # the dot of "1." in a list ends nothing


@dataclass(frozen=True)
class Question:
    """A prompt's tokens, the float model's answer, and how many of its tokens hold the first sentence."""

    prompt: list[int]
    answer: list[int]
    sentence: int


@dataclass(frozen=True)
class Agreement:
    """How far a model gives the float model's answers, prompt by prompt.

    Args:
        same: leading tokens that are the same.
        sentence: tokens of the first sentence.
        length: tokens of the answer.
    """

    same: tuple[int, ...]
    sentence: tuple[int, ...]
    length: tuple[int, ...]

    def to_json(self) -> dict[str, float]:
        """Figures of a row; ``chat_first`` is whether the first prompt's first sentence is the same."""
        told = [same >= sentence for same, sentence in zip(self.same, self.sentence, strict=True)]
        shares = [same / length for same, length in zip(self.same, self.length, strict=True)]
        return {
            "chat_prompts": len(told),
            "chat_sentences": sum(told),
            "chat_tokens": sum(shares) / len(shares),
            "chat_first": told[0],
        }

    def text(self) -> str:
        """First sentences and tokens, as a table's cell."""
        figures = self.to_json()
        return f"{figures['chat_sentences']}/{figures['chat_prompts']}, {100 * figures['chat_tokens']:.0f} %"


def prompts_digest() -> str:
    """Of the prompts and the answers' length, for the names of kept files."""
    return hashlib.sha256(PROMPTS.read_bytes() + str(LENGTH).encode()).hexdigest()[:10]


def sentence_length(words: list[str]) -> int:
    """How many tokens hold the first sentence of an answer.

    Args:
        words: the answer's text after one token, after two, and so on.
    """
    end = _END.search(words[-1].lstrip())
    if end is None:
        return len(words)
    reach = end.start() + 1 if end.group() != "\n" else end.start()
    return next(count for count, text in enumerate(words, 1) if len(text.lstrip()) >= reach)


def questions(checkpoint: Checkpoint, keep: Path) -> list[Question]:
    """The prompts and what the float model answers, computed once.

    Args:
        checkpoint: a decoder with a chat template.
        keep: file of the answers.
    """
    if not keep.exists():
        model, tokenizer = checkpoint.load_model(), AutoTokenizer.from_pretrained(checkpoint.folder)
        found = [_ask(model, tokenizer, line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
        keep.write_text(json.dumps([asdict(question) for question in found]))
    return [Question(**each) for each in json.loads(keep.read_text())]


def agreement(model: torch.nn.Module, asked: list[Question]) -> Agreement:
    """How far a model gives the same answers.

    Args:
        model: with its weights quantized.
        asked: what the float model was asked, and said.
    """
    same = []
    for question in asked:
        ids = torch.tensor([question.prompt + question.answer[:-1]])
        with torch.no_grad():
            said = model(input_ids=ids).logits[0, len(question.prompt) - 1 :].argmax(-1)
        equal = said == torch.tensor(question.answer)
        same.append(int(equal.long().cumprod(0).sum()))
    return Agreement(tuple(same), tuple(q.sentence for q in asked), tuple(len(q.answer) for q in asked))


def figures_on(checkpoint: Checkpoint, folder: Path, asked: list[Question]) -> Figures:
    """KL, top-1 agreement and loss on the float model's answers, answer by answer; the prompts do not count.

    Args:
        checkpoint: the float model.
        folder: what a tuner's side left.
        asked: what the float model was asked, and said.
    """
    model, (tensors, layers) = checkpoint.load_model(), read(folder)
    quantized = checkpoint.load_model()
    put(quantized, tensors, set(layers), block_linears(quantized))
    return Figures(bits_per_weight(quantized, layers), *losses_on(model, quantized, asked))


def losses_on(
    model: torch.nn.Module, quantized: torch.nn.Module, asked: list[Question]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """KL, top-1 agreement and loss of a quantized model, each float64 [answers], means over an answer's tokens."""
    rows = []
    for question in asked:
        ids, said = torch.tensor([question.prompt + question.answer[:-1]]), torch.tensor(question.answer)
        p, q = (log_probabilities(own, ids)[0, len(question.prompt) - 1 :] for own in (model, quantized))
        agree = (p.argmax(-1) == q.argmax(-1)).float()
        rows.append(((p.exp() * (p - q)).sum(-1).mean(), agree.mean(), -q.gather(1, said[:, None]).mean()))
    kl, top1, loss = (np.array(column, np.float64) for column in zip(*rows, strict=True))
    return kl, top1, loss


def _ask(model: torch.nn.Module, tokenizer: AutoTokenizer, prompt: str) -> Question:
    message = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
    given = torch.tensor([ids])
    with torch.no_grad():
        written = model.generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=LENGTH)
    answer = written[0, len(ids) :].tolist()
    texts = [tokenizer.decode(answer[:count], skip_special_tokens=True) for count in range(1, len(answer) + 1)]
    return Question(list(ids), answer, sentence_length(texts))
