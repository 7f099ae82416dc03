"""Makes paragraphs.txt.xz: who wrote this paragraph?  Novels of 20 authors, cut into paragraphs to learn and to test.

    python cut.py FOLDER          FOLDER holds texts in the public domain, author_title.txt, one paragraph a line

Paragraphs of 240 to 420 characters, longer ones cut behind a sentence, drawn at random.  Ten authors have several books
here: what is tested is from a book of which nothing was learned.  Of the other ten one book was at hand: its first half
is learned, its last third tested.  A paragraph that stands in ../text is left out.

    line = author TAB learn|test TAB paragraph
"""

import lzma
import random
import sys
from pathlib import Path

HERE = Path(__file__).parent
LEARN, TEST = 50, 100  # paragraphs per author
SHORTEST, LONGEST = 240, 420
LAST_BOOKS = {  # tested; the author's other books are learned
    "anthony-trollope": "barchester",
    "arthur-conan-doyle": "hound",
    "alexandre-dumas": "musketeers",
    "charles-dickens": "expectations",
    "fyodor-dostoevsky": "crime",
    "george-eliot": "middlemarch",
    "jane-austen": "emma",
    "leo-tolstoy": "anna",
    "mark-twain": "sawyer",
    "wilkie-collins": "moonstone",
}
ONE_BOOK = (
    "bram-stoker", "charlotte-bronte", "henry-james", "herman-melville", "jack-london", "mary-shelley", "oscar-wilde",
    "robert-louis-stevenson", "thomas-hardy", "william-makepeace-thackeray",
)  # fmt: skip


def paragraphs(path: Path, seen: str) -> list[str]:
    """Paragraphs of a book, cut to the right length, that were not seen in tuning."""
    lines = (" ".join(line.split()) for line in path.read_text(encoding="utf-8").splitlines())
    cut = (line if len(line) <= LONGEST else line[: line.rfind(". ", 0, LONGEST) + 1] for line in lines)
    return [line for line in cut if len(line) >= SHORTEST and line[:60] not in seen]


def parts(folder: Path, author: str, seen: str) -> tuple[list[str], list[str]]:
    """What may be learned of an author, and what may be tested."""
    books = {path.name: paragraphs(path, seen) for path in sorted(folder.glob(f"{author}_*.txt"))}
    if author in ONE_BOOK:
        (found,) = books.values()
        return found[: len(found) // 2], found[-(len(found) // 3) :]
    test = next(name for name in books if LAST_BOOKS[author] in name)
    return [line for name, lines in books.items() if name != test for line in lines], books[test]


def main() -> None:
    folder, draw = Path(sys.argv[1]), random.Random(20)
    seen = "".join(
        (HERE.parent / "text" / name).read_text(encoding="utf-8") for name in ("calibration.txt", "heldout.txt")
    )
    lines = []
    for author in sorted([*LAST_BOOKS, *ONE_BOOK]):
        for part, count, found in zip(("learn", "test"), (LEARN, TEST), parts(folder, author, seen), strict=True):
            lines += [f"{author}\t{part}\t{text}\n" for text in draw.sample(found, count)]
    data = lzma.compress("".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME)
    (HERE / "paragraphs.txt.xz").write_bytes(data)
    print(f"{len(lines)} paragraphs, {sum(map(len, lines))} characters, {len(data)} bytes")


if __name__ == "__main__":
    main()
