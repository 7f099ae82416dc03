"""What guessing ahead changes, and what it brings: drafting_gain.py PACKAGE [--draft PACKAGE] [--precise] [--tokens N].

Greedy answers to 50 prompts, half of them questions, half about a sentence of held-out text: alone, with prompt lookup,
and with a draft package if one is given.  Says how many texts are the same, tokens per run of the model, how many
guesses were kept, and tokens per second against the plain run.  The ways take turns, prompt by prompt.  Times are the
processor's, not the clock's, so that a busy machine tells the same; one thread therefore.
"""

import argparse
import re
import time
from pathlib import Path

from roundexport.runtime import GenerationSettings
from roundexport.runtime.batch import Batch, Counts
from roundexport.runtime.writing import drafter_for, load_decoder

HELD_OUT = Path(__file__).parent / "text" / "heldout.txt"
THINGS = (
    "the sea", "a lighthouse", "bread", "winter", "a violin", "rain", "the moon", "a bicycle", "honey", "the desert",
    "a library", "iron", "a river", "salt", "a forest", "glass", "a clock", "wool", "the wind", "a bridge", "coffee",
    "a garden", "snow", "a map", "fire",
)  # fmt: skip
TASKS = (
    "Repeat this sentence: ",
    "Write this in upper case: ",
    "Who or what is this about? ",
    "Correct the spelling: ",
)


def prompts() -> list[str]:
    text = " ".join(HELD_OUT.read_text(encoding="utf-8").split())
    sentences = [found for found in re.findall(r"[A-Z][^.!?]{40,120}[.!?]", text)][: len(THINGS)]
    about = [TASKS[i % len(TASKS)] + sentence for i, sentence in enumerate(sentences)]
    return [f"What is {thing}?" for thing in THINGS] + about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package")
    parser.add_argument("--draft")
    parser.add_argument("--precise", action="store_true")
    parser.add_argument("--tokens", type=int, default=48)
    given = parser.parse_args()
    how = {"threads": 1, "precise": given.precise}
    decoder = load_decoder(given.package, **how)
    ways = {"plain": None, "lookup": drafter_for(decoder, None, True)}
    if given.draft:
        ways["draft"] = drafter_for(decoder, given.draft, False, **how)
    settings = GenerationSettings(max_new_tokens=given.tokens)
    same, seconds, totals = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0.0), {way: Counts() for way in ways}
    asked = prompts()
    for number, prompt in enumerate(asked):
        ids, found = decoder.encode(prompt, chat=decoder.tokenizer.has_chat_template), {}
        order = list(ways)
        for way in order[number % len(order) :] + order[: number % len(order)]:
            batch, answer = Batch(decoder.backend, drafter=ways[way]), decoder.answer(ids, settings)
            batch.admit(answer)
            batch.advance()  # the prompt
            began = time.process_time()
            while len(batch):
                batch.advance()
            seconds[way] += time.process_time() - began
            for name in ("written", "runs", "guessed", "accepted"):
                setattr(totals[way], name, getattr(totals[way], name) + getattr(batch.counts, name))
            found[way] = answer.new_tokens
            batch.close()
        for way in ways:
            same[way] += found[way] == found["plain"]
    speed = {way: (totals[way].written - len(asked)) / seconds[way] for way in ways}
    for way, count in totals.items():
        kept = f", {count.accepted} of {count.guessed} guesses kept" if count.guessed else ""
        print(
            f"{way:7s} {same[way]} of {len(asked)} texts equal, {count.written / count.runs:.2f} tokens a run{kept}, "
            f"{speed[way]:.1f} tokens/s ({speed[way] / speed['plain']:.2f} of plain)",
            flush=True,
        )


if __name__ == "__main__":
    main()
