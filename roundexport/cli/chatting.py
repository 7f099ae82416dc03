r"""The verb `chat`: a conversation in the terminal, or with whatever writes lines into it.

    /system TEXT   how the model is to behave; the history stays       /stats   of the last turn, and of all
    /reset         forget the history                                  /help    these lines
    /save FILE     the conversation as JSON                            /quit    leave; so does Ctrl-D
    /image FILE    a picture for the next message

Ctrl-C stops an answer, which stays in the history as far as it came; a second one ends the program.  A line that begins
with two slashes is a message that begins with one.  Answers go to stdout; everything else goes to stderr.  Each turn
reads only what is new; what no longer fits into the package's context is forgotten, oldest first, and that is said.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from roundexport.errors import UsageError

from . import printing
from .failures import told
from .shared_options import Engine, Precise, Properties, RuntimeDevice, Threads, named_values
from .text_options import Choosing, Guessing, gain, takes

if TYPE_CHECKING:
    from roundexport.runtime.conversation import Conversation
    from roundexport.runtime.settings import GenerationSettings

_PROMPT = "> "


@takes(Choosing, Guessing, max_new_tokens=512)
def chat(  # noqa: PLR0913, PLR0917
    package: Path,
    choosing: Choosing,
    guessing: Guessing,
    system: Annotated[
        str | None, typer.Option(help="How the model is to behave; default: as its template says.")
    ] = None,
    engine: Engine = "auto",
    device: RuntimeDevice = "CPU",
    threads: Threads = None,
    precise: Precise = False,
    properties: Properties = None,
) -> None:
    """Chat with a package; /help lists what else can be said, Ctrl-D leaves."""
    from roundexport.runtime.conversation import Conversation
    from roundexport.runtime.writing import drafter_for, load_decoder

    settings, own, guesser = choosing.settings(), named_values(properties, "--property"), guessing.told()
    decoder = load_decoder(package, engine=engine, device=device, threads=threads, precise=precise, properties=own)
    _note(str(decoder.choice))
    drafter = drafter_for(
        decoder, guessing.draft, guessing.lookup,
        device=device, threads=threads, precise=precise, properties=guesser,
    )  # fmt: skip
    conversation = Conversation(decoder, system, drafter=drafter)
    try:
        _Chat(package, conversation, settings).run()
    finally:
        conversation.close()


class _Chat:
    """The loop around a conversation.

    Args:
        package: its folder, for what is saved.
        conversation: the history and the model.
        settings: how answers are written.
    """

    def __init__(self, package: Path, conversation: Conversation, settings: GenerationSettings) -> None:
        self._package, self._conversation, self._settings = package, conversation, settings
        self._pictures: list[Path] = []
        self._seen = sys.stdin.isatty() and sys.stdout.isatty()
        self._commands: dict[str, Callable[[str], None]] = {
            "system": self._system, "reset": self._reset, "save": self._save, "stats": self._stats, "help": self._help,
            "image": self._image,
        }  # fmt: skip

    def run(self) -> None:
        """Read lines until there are no more, or /quit."""
        if self._seen:
            _note("/help lists what else can be said; Ctrl-C stops an answer, Ctrl-D leaves")
        for line in _lines(self._seen):
            text = line.strip()
            if text == "/quit":
                return
            try:
                if text.startswith("/") and not text.startswith("//"):
                    name, _, rest = text[1:].partition(" ")
                    self._commands.get(name, self._unknown)(rest.strip())
                elif text:
                    self._answer(text[1:] if text.startswith("//") else text)
            except BrokenPipeError:  # nobody reads the answers any more
                raise
            except Exception as error:  # of one line; the conversation goes on
                told(error)

    def _answer(self, question: str) -> None:
        with _stoppable() as stopped:
            pieces = self._conversation.ask(question, self._settings, self._pictures)
            try:
                for piece in pieces:
                    printing.piece(piece)
                    if stopped():
                        break
            finally:
                pieces.close()  # type: ignore[attr-defined]
        print(flush=True)
        self._pictures.clear()
        turn = self._conversation.turns[-1]
        if turn.finished == "stopped":
            _note("(stopped)")
        elif turn.finished == "length":
            _note("(cut: the answer has as many tokens as it may; see --max-new-tokens)")
        if turn.forgotten:
            _note(f"(forgotten: the {turn.forgotten} oldest questions and their answers, to make room)")

    def _system(self, text: str) -> None:
        if text:
            self._conversation.system = text
        else:
            _note(f"system message: {self._conversation.system or 'as the chat template says'}")

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        _note("the history is empty; the system message stays")

    def _image(self, name: str) -> None:
        path = Path(name).expanduser()
        if not path.is_file():
            raise UsageError(f"/image needs the name of a file, not {name!r}")
        self._pictures.append(path)
        _note(f"the next message is about {', '.join(map(str, self._pictures))}")

    def _save(self, name: str) -> None:
        from roundexport.storage.atomic import make_parents, replace_file

        if not name:
            raise UsageError("/save needs the name of a file")
        path = Path(name).expanduser()
        if path.exists():
            raise UsageError(f"{path} exists; choose another name")
        saved = {"package": str(self._package), "messages": self._conversation.messages}
        make_parents(path.parent)
        replace_file(path, (json.dumps(saved, ensure_ascii=False, indent=1) + "\n").encode())
        _note(f"{path}: {len(saved['messages'])} messages")

    def _stats(self, _: str) -> None:
        turns = self._conversation.turns
        if not turns:
            _note("no turn yet")
            return
        last, total = turns[-1], self._conversation.counts
        speed = f", {last.tokens_per_second:.1f} tokens/s" if last.tokens_per_second else ""
        first = f", first token after {last.ttft_ms:.0f} ms" if last.ttft_ms is not None else ""
        _note(
            f"last turn: {last.counts.read} tokens read, {last.counts.reused} reused{first}; {gain(last.counts)}{speed}"
        )
        _note(f"all {len(turns)}: {total.read} tokens read, {total.reused} reused; {gain(total)}")

    def _help(self, _: str) -> None:
        print((__doc__ or "").split("\n\n")[1], file=sys.stderr)

    def _unknown(self, _: str) -> None:
        raise UsageError("that command is not known; /help lists them, // begins a message with a slash")


def _lines(seen: bool) -> Iterator[str]:
    """What is typed, with the terminal's history of lines; or the lines of a pipe."""
    if not seen:
        yield from sys.stdin
        return
    try:
        import readline  # noqa: F401  (gives input() its history)
    except ImportError:
        pass
    while True:
        try:
            yield input(_PROMPT)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()


@contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C is only remembered: a run of the model is never torn in the middle."""
    pressed: list[int] = []

    def remember(number: int, _: Any) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def _note(text: str) -> None:
    print(printing.printable(text), file=sys.stderr, flush=True)
