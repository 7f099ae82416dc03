"""A GGUF file that roundexport wrote, opened by llama.cpp: are its tokens the tokenizer's, and what does it answer?

    asked.py FILE TOKENIZER_JSON QUESTION

Needs llama-cpp-python.  Prints tokens of a text by both, and a greedy answer by the file's own chat template; the exit
code is 1 where a token differs.
"""

import sys

from llama_cpp import Llama
from tokenizers import Tokenizer

TEXT = (
    "The 3 ships' captains didn't wait 12345 days: naïve, they said — \n\n  über-früh!  <b>x = 10_000;</b>\t日本語 🚀"
)


def main(file: str, tokenizer: str, question: str) -> int:
    """Print what was found."""
    model = Llama(file, n_ctx=512, n_threads=1, verbose=False)
    theirs = model.tokenize(TEXT.encode(), add_bos=False, special=False)
    ours = Tokenizer.from_file(tokenizer).encode(TEXT, add_special_tokens=False).ids
    print(f"tokens of a text: {len(theirs)} by llama.cpp, {'the same' if theirs == ours else 'OTHERS'} by tokenizers")
    message = [{"role": "user", "content": question}]
    answer = model.create_chat_completion(message, max_tokens=48, temperature=0.0)  # type: ignore[arg-type]
    print(answer["choices"][0]["message"]["content"])  # type: ignore[index]
    return 0 if theirs == ours else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
