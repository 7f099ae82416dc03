"""What a grammar costs, by two libraries: grammar_cost.py PACKAGE_OR_MODEL [llguidance,xgrammar] [ROUNDS].

For a JSON schema of middling size and a regex: the tokenizer's tables, once; compiling; then the mask of every token of
texts that satisfy them, computed as bits and laid over float32 logits.  Only the tokenizer of the folder is read.
Times are the processor's, not the clock's, so that a busy machine tells the same.
xgrammar needs torch, pydantic and apache-tvm-ffi beside itself.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

TEXT = {"type": "string", "minLength": 1, "maxLength": 60}
SCHEMA = {
    "type": "object",
    "properties": {
        "title": TEXT,
        "kind": {"enum": ["novel", "poem", "letter", "play"]},
        "year": {"type": "integer", "minimum": 0, "maximum": 2100},
        "rating": {"type": "number"},
        "authors": {
            "type": "array",
            "minItems": 1,
            "maxItems": 4,
            "items": {
                "type": "object",
                "properties": {"name": TEXT, "born": {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"}},
                "required": ["name", "born"],
                "additionalProperties": False,
            },
        },
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 8},
        "in_print": {"type": "boolean"},
    },
    "required": ["title", "kind", "year", "rating", "authors", "tags", "in_print"],
    "additionalProperties": False,
}
REGEX = r"[A-Z][a-z]{1,20}( [A-Z][a-z]{1,20}){0,4}, [0-9]{1,4}(\.[0-9]{2})? (EUR|USD), [a-z0-9._]{1,40}@[a-z0-9.]{1,30}"
VALUE = {
    "title": "The Old Man and the Sea", "kind": "novel", "year": 1952, "rating": 4.5,
    "authors": [{"name": "Ernest Hemingway", "born": "1899-07-21"}, {"name": "Señor “Nobody”", "born": "1900-01-01"}],
    "tags": ["fishing", "a long day at sea", "marlin"], "in_print": True,
}  # fmt: skip
CASES = {
    "json": (
        json.dumps(SCHEMA),
        [json.dumps(VALUE, ensure_ascii=False), json.dumps(VALUE, ensure_ascii=False, indent=2)],
    ),
    "regex": (REGEX, ["Santiago Of The Sea, 1952.50 EUR, old.man@sea.example.org", "Ann, 7 USD, a@b"]),
}
Begin = Callable[[], tuple[Callable[[], None], Callable[[int], bool]]]


def llguidance(tokenizer: Tokenizer, eos: int, logits: np.ndarray) -> Callable[[str, str], Begin]:
    from roundexport.runtime.grammar import Grammars
    from roundexport.runtime.settings import Grammar

    grammars = Grammars(tokenizer, len(logits), (eos,))

    def compile(kind: str, text: str) -> Begin:
        grammars.forget()
        first = grammars.mask(Grammar("json_schema" if kind == "json" else "regex", text))

        def begin() -> tuple[Callable[[], None], Callable[[int], bool]]:
            mask = first.copy()
            return lambda: mask.restrict(logits), lambda token: mask.accept(token) or mask.ended != "length"

        return begin

    return compile


def xgrammar(tokenizer: Tokenizer, eos: int, logits: np.ndarray) -> Callable[[str, str], Begin]:
    import torch
    import xgrammar as xg

    torch.set_num_threads(1)
    vocabulary = [tokenizer.id_to_token(i) or "" for i in range(len(logits))]
    info = xg.TokenizerInfo(vocabulary, xg.VocabType.BYTE_LEVEL, vocab_size=len(logits), stop_token_ids=[eos])
    compiler = xg.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    bits, given = xg.allocate_token_bitmask(1, len(logits)), torch.from_numpy(logits)

    def compile(kind: str, text: str) -> Begin:
        made = compiler.compile_json_schema(text) if kind == "json" else compiler.compile_regex(text)

        def begin() -> tuple[Callable[[], None], Callable[[int], bool]]:
            matcher = xg.GrammarMatcher(made)

            def restrict() -> None:
                matcher.fill_next_token_bitmask(bits)
                out = given.clone()
                xg.apply_token_bitmask_inplace(out[None], bits, backend="cpu")

            return restrict, matcher.accept_token

        return begin

    return compile


def measure(name: str, tokenizer: Tokenizer, rounds: int) -> None:
    logits = np.random.default_rng(0).standard_normal(tokenizer.get_vocab_size()).astype(np.float32)
    library = {"llguidance": llguidance, "xgrammar": xgrammar}[name]
    began = time.process_time()
    compile = library(tokenizer, 0, logits)
    print(f"{name}: tables of {len(logits)} tokens {1e3 * (time.process_time() - began):.0f} ms, imports included")
    for kind, (grammar, texts) in CASES.items():
        compiled, masks = [], []
        for _ in range(rounds):
            began = time.process_time()
            begin = compile(kind, grammar)
            compiled.append(time.process_time() - began)
            for text in texts:
                restrict, accept = begin()
                for token in tokenizer.encode(text, add_special_tokens=False).ids:
                    began = time.process_time()
                    restrict()
                    masks.append(time.process_time() - began)
                    assert accept(token), (text, token)
        us = 1e6 * np.percentile(masks, [50, 99])
        print(
            f"  {kind:6s} compile {1e3 * np.median(compiled):.2f} ms (median of {rounds}), "
            f"mask and logits p50 {us[0]:.0f} µs, p99 {us[1]:.0f} µs, max {1e6 * max(masks):.0f} µs (n {len(masks)})"
        )


def main() -> None:
    folder, names, rounds = [*sys.argv[1:], *("llguidance", "20")[len(sys.argv) - 2 :]]
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    for name in names.split(","):
        measure(name, tokenizer, int(rounds))


if __name__ == "__main__":
    main()
